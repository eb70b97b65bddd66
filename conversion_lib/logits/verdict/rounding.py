"""What a check allows: float32's own error, and where that or a plan's rounding does more to a model, what it does.

MaxText holds some weights in other values than the source, a query divided by sqrt(head_dim) for one, and a float32
source saved in bfloat16 is rounded everywhere. How far that moves the logits depends on the model, so it is measured
there: a second run whose rounded weights are moved by as much as rounding can have moved any of them, up or down at
random. That is sqrt(3) times what rounding moves them by on average (root mean square), and three times its KL.

Delta nets magnify what float32 itself loses, each model in its own measure, and there a second run measures that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conversion_lib.core.tensors import Array, TensorInfo
from conversion_lib.logits.forward.config import DeltaNet, ForwardConfig
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import Relative, compare_logits, relative_difference

EXACT_KL = 1e-5
"""Where both sides hold the same bits, what is left is the order of float32 sums: on tiny models of all
families at most 5e-9. Real models are deeper and their sums longer, so there is room above that."""


EXACT_BLOCK = Relative(mean=5e-4, largest=5e-3)
"""How far off a block may be. Blocks of the same bits, given the same inputs, stayed below 2e-5 on tiny models. A token
whose output is a small difference of large numbers may lose more than others: hence ten times as much for a single
one."""

EXACT_TIE, DELTA_NETS_TIE = 5e-4, 1e-2
"""The share of a score by which scores may differ and count as equal: of experts, and of an indexer's tokens."""

ROUNDED_TIE = 0.05
"""The same where a plan rounds, which moves scores of experts by up to some hundredths."""

BFLOAT16_BITS, SUM_BITS = 8, 22
"""Significant bits of bfloat16; and of a float32 that lost in sums what the two libraries' orders of summing differ by.
In tiny models of 48 and 60 layers with delta nets, with random weights of four seeds, three times the KL measured so
was 7 to 1,700 times the true one, which was 5e-6 to 1.3e-4; with 24 bits, float32's own, it was below it in three of
eight."""

LARGEST_MARGIN, BLOCK_MARGIN = 3, 1.5
"""Of what a check allows over what the second run measured: the largest of a token, one draw against another, and the
mean of a block, for a router's few biases may add up. The mean KL has none."""

WIDER = ("float32", "float16", "float64")
"""Dtypes with more bits than bfloat16's eight."""


@dataclass(frozen=True)
class Dither:
    """What a second run changes to measure what a loss of accuracy does to a model: values of `leaves`, up or down at
    random, by half a unit in the last place of a number of so many significant bits."""

    leaves: frozenset[str]
    bits: int

    @property
    def is_rounding(self) -> bool:
        """Whether the values are roundings of the source's, rather than all that float32 may lose in sums."""
        return self.bits == BFLOAT16_BITS


def tie_share(config: ForwardConfig, dither: Dither | None = None) -> float:
    """By what share scores may differ and count as equal."""
    rounded = ROUNDED_TIE if dither is not None and dither.is_rounding else 0
    return max(DELTA_NETS_TIE if _has_delta_nets(config) else EXACT_TIE, rounded)


def _has_delta_nets(config: ForwardConfig) -> bool:
    return any(isinstance(layer.attention, DeltaNet) for layer in config.layers)


def rounded_leaves(config: ForwardConfig, tensors: Mapping[str, TensorInfo], source_dtype: str) -> frozenset[str]:
    """The leaves of a checkpoint that are roundings of their source's values.

    source_dtype: that of the original's weights; empty where nobody knows, and then bfloat16 is assumed.
    """
    return frozenset(
        name
        for name, info in tensors.items()
        if info.dtype == "bfloat16" and (source_dtype in WIDER or name.endswith(config.rounded))
    )


def dither_of(config: ForwardConfig, tensors: Mapping[str, TensorInfo], source_dtype: str) -> Dither | None:
    """How a second run measures what is to be allowed; None where EXACT_KL says enough. source_dtype: as
    `rounded_leaves` has it."""
    if rounded := rounded_leaves(config, tensors, source_dtype):
        return Dither(rounded, BFLOAT16_BITS)
    return Dither(frozenset(tensors), SUM_BITS) if _has_delta_nets(config) else None


class Allowance:
    """What a check allows, by the runs with and without dither. max_kl: of any token, in nats; mean_kl: of all, None
    where the largest says enough."""

    def __init__(self) -> None:
        self.max_kl: float = EXACT_KL
        self.mean_kl: float | None = None

    def of_blocks(self, found: blocks.States, dithered: blocks.States | None) -> Mapping[str, Relative]:
        """How far off each block of a layer may be, by what it put out in both runs."""
        allowed: dict[str, Relative] = defaultdict(lambda: EXACT_BLOCK)
        for name in dithered or {}:
            assert dithered is not None
            allowed[name] = self.of_block(relative_difference((found[name], dithered[name])))
        return allowed

    def of_block(self, measured: Relative | None) -> Relative:
        """How far off a block may be that rounding moves by `measured`."""
        if measured is None or not measured.largest < float("inf"):
            return EXACT_BLOCK
        return Relative(
            mean=max(EXACT_BLOCK.mean, BLOCK_MARGIN * measured.mean),
            largest=max(EXACT_BLOCK.largest, LARGEST_MARGIN * measured.largest),
        )

    def of_logits(self, found: Sequence[Array], dithered: Sequence[Array]) -> None:
        """Sets `max_kl` and `mean_kl` by the logits of both runs."""
        measured = compare_logits(found, dithered)
        if measured.max_kl < float("inf"):
            self.max_kl = max(EXACT_KL, LARGEST_MARGIN * measured.max_kl)
            self.mean_kl = max(EXACT_KL, measured.mean_kl)
