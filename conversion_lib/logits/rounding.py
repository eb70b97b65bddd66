"""What a check allows: float32's own error, and where a plan rounds, what that rounding does to this very model.

MaxText holds some weights in other values than the source, a query divided by sqrt(head_dim) for one, and a float32
source saved in bfloat16 is rounded everywhere. How far that moves the logits depends on the model, so it is measured
there: a second run whose rounded weights are moved at random by as much as rounding may have moved them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conversion_lib.logits import blocks
from conversion_lib.logits.compare import compare_logits, relative_difference
from conversion_lib.logits.config import DeltaNet, ForwardConfig
from conversion_lib.sources.base import Array, TensorInfo

EXACT_KL = 1e-5
"""Where both sides hold the same bits, what is left is the order of float32 sums: on tiny models of all
families at most 5e-9. Real models are deeper and their sums longer, so there is room above that."""


@dataclass(frozen=True)
class Limits:
    """What float32 explains where both sides hold the same bits. max_kl: of any token; mean_kl: of all, None where the
    largest says enough; block: relative difference of what a block puts out, above which it departs."""

    max_kl: float
    mean_kl: float | None
    block: float


EXACT = Limits(EXACT_KL, None, 5e-4)
"""Same bits stayed below 2e-5 on tiny models, 1.3e-4 in twelve layers of Gemma 4."""

DELTA_NETS = Limits(1e-4, 1e-5, 1e-2)
"""The norms in a delta net magnify what float32 loses: 1e-3 in a tiny model of eight layers, whose largest KL was 5e-8;
4e-2, largest KL 2.2e-5, mean 3e-7, in one of 48 layers."""

MAX_MARGIN, MEAN_MARGIN, BLOCK_MARGIN = 10, 3, 3
"""Of what a check allows over what the second run measured: one draw against another. On tiny models whose query, or
every weight, was rounded (24 checkpoints) the true figures were at most 2.5, 1.2 and 2.1 times the measured ones; one
bfloat16 tensor of four layers with a noise of 1 % had a mean KL of 5.5 times and more."""

WIDER = ("float32", "float16", "float64")
"""Dtypes with more bits than bfloat16's eight."""


def exact_limits(config: ForwardConfig) -> Limits:
    """Those for a model."""
    return DELTA_NETS if any(isinstance(layer.attention, DeltaNet) for layer in config.layers) else EXACT


def rounded_leaves(config: ForwardConfig, tensors: Mapping[str, TensorInfo], source_dtype: str) -> frozenset[str]:
    """The leaves of a checkpoint that are roundings of their source's values.

    source_dtype: that of the original's weights; empty where nobody knows, and then bfloat16 is assumed.
    """
    return frozenset(
        name
        for name, info in tensors.items()
        if info.dtype == "bfloat16" and (source_dtype in WIDER or name.endswith(config.rounded))
    )


class Allowance:
    """What a check allows, by the runs with and without dither. max_kl: of any token, in nats; mean_kl: of all, None
    where the largest says enough."""

    def __init__(self, config: ForwardConfig) -> None:
        self._exact = exact_limits(config)
        self.max_kl, self.mean_kl = self._exact.max_kl, self._exact.mean_kl

    def of_blocks(self, found: blocks.States, dithered: blocks.States | None) -> dict[str, float]:
        """The relative difference allowed of each block of a layer, by what it put out in both runs."""
        exact = self._exact.block
        allowed: dict[str, float] = defaultdict(lambda: exact)
        for name in dithered or {}:
            assert dithered is not None
            measured = relative_difference(found[name], dithered[name])
            allowed[name] = max(exact, BLOCK_MARGIN * measured if measured < float("inf") else 0)
        return allowed

    def of_logits(self, found: Sequence[Array], dithered: Sequence[Array]) -> None:
        """Sets `max_kl` and `mean_kl` by the logits of both runs."""
        measured = compare_logits(found, dithered)
        if measured.max_kl < float("inf"):
            self.max_kl = max(self._exact.max_kl, MAX_MARGIN * measured.max_kl)
            self.mean_kl = max(self._exact.mean_kl or EXACT_KL, MEAN_MARGIN * measured.mean_kl)
