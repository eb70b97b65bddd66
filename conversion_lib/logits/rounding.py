"""What a check allows: float32's own error, and where a plan rounds, what that rounding does to this very model.

MaxText holds some weights in other values than the source, a query divided by sqrt(head_dim) for one, and a float32
source saved in bfloat16 is rounded everywhere. How far that moves the logits depends on the model, so it is measured
there: a second run whose rounded weights are moved by as much as rounding can have moved any of them, up or down at
random. That is sqrt(3) times what rounding moves them by on average (root mean square), and three times its KL.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from conversion_lib.logits import blocks
from conversion_lib.logits.compare import Relative, compare_logits, relative_difference
from conversion_lib.logits.config import DeltaNet, ForwardConfig
from conversion_lib.sources.base import Array, TensorInfo

EXACT_KL = 1e-5
"""Where both sides hold the same bits, what is left is the order of float32 sums: on tiny models of all
families at most 5e-9. Real models are deeper and their sums longer, so there is room above that."""


@dataclass(frozen=True)
class Limits:
    """What float32 explains where both sides hold the same bits. max_kl: of any token; mean_kl: of all, None where the
    largest says enough; block: how far off a block may be; tie: the share of a score by which experts' scores may
    differ and count as equal."""

    max_kl: float
    mean_kl: float | None
    block: Relative
    tie: float


EXACT = Limits(EXACT_KL, None, Relative(mean=5e-4, largest=5e-3), tie=5e-4)
"""Blocks of the same bits, given the same inputs, stayed below 2e-5 on tiny models. A token whose output is a small
difference of large numbers may lose more than others: hence ten times as much for a single one."""

DELTA_NETS = Limits(1e-4, 1e-5, EXACT.block, tie=1e-2)
"""The norms in a delta net magnify what float32 loses: in a tiny model of 48 layers the stream was 4e-2 off at the end,
and the largest KL 2.2e-5, the mean 3e-7."""

ROUNDED_TIE = 0.05
"""`Limits.tie` where a plan rounds, which moves scores of experts by up to some hundredths."""

LARGEST_MARGIN, BLOCK_MARGIN = 3, 1.5
"""Of what a check allows over what the second run measured: the largest of a token, one draw against another, and the
mean of a block, for a router's few biases may add up. The mean KL has none."""

WIDER = ("float32", "float16", "float64")
"""Dtypes with more bits than bfloat16's eight."""


def exact_limits(config: ForwardConfig) -> Limits:
    """Those for a model."""
    return DELTA_NETS if any(isinstance(layer.attention, DeltaNet) for layer in config.layers) else EXACT


def tie(config: ForwardConfig, rounded: Collection[str]) -> float:
    """By what share scores of experts may differ and count as equal. rounded: the leaves that are roundings."""
    return max(exact_limits(config).tie, ROUNDED_TIE if rounded else 0)


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

    def of_blocks(self, found: blocks.States, dithered: blocks.States | None) -> Mapping[str, Relative]:
        """How far off each block of a layer may be, by what it put out in both runs."""
        allowed: dict[str, Relative] = defaultdict(lambda: self._exact.block)
        for name in dithered or {}:
            assert dithered is not None
            allowed[name] = self.of_block(relative_difference((found[name], dithered[name])))
        return allowed

    def of_block(self, measured: Relative | None) -> Relative:
        """How far off a block may be that rounding moves by `measured`."""
        exact = self._exact.block
        if measured is None or not measured.largest < float("inf"):
            return exact
        return Relative(
            mean=max(exact.mean, BLOCK_MARGIN * measured.mean),
            largest=max(exact.largest, LARGEST_MARGIN * measured.largest),
        )

    def of_logits(self, found: Sequence[Array], dithered: Sequence[Array]) -> None:
        """Sets `max_kl` and `mean_kl` by the logits of both runs."""
        measured = compare_logits(found, dithered)
        if measured.max_kl < float("inf"):
            self.max_kl = max(self._exact.max_kl, LARGEST_MARGIN * measured.max_kl)
            self.mean_kl = max(self._exact.mean_kl or EXACT_KL, measured.mean_kl)
