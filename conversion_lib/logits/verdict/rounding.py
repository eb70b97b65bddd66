"""What a check allows: the error of float32, and the measured effect of rounding or of delta nets if that is larger.

MaxText scales some weights, such as the query by 1 / sqrt(head_dim), so that they are rounded once more than in the
source. A float32 source saved in bfloat16 is rounded everywhere. How far this moves the logits depends on the model, so
it is measured: a second run moves each rounded weight up or down at random, by the most that rounding can have moved
it. That is sqrt(3) times the root mean square of rounding errors, and three times their KL.

Delta nets amplify the error of float32 itself, by a factor that depends on the model. There a second run measures it.
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
"""Limit on the KL of a token, in nats, if both sides hold the same values. Only the order of float32 sums differs then.
On tiny models of all families this gives at most 5e-9. Real models are deeper and have longer sums."""


EXACT_BLOCK = Relative(mean=5e-4, largest=5e-3)
"""Limit on the relative error of a block. With equal weights and inputs it stayed below 2e-5 on tiny models. A token
whose output is a small difference of large numbers loses more, so a single token may be off by ten times as much."""

EXACT_TIE, DELTA_NETS_TIE = 5e-4, 1e-2
"""Scores of experts, or of an indexer's tokens, count as equal if they differ by at most this share."""

ROUNDED_TIE = 0.05
"""The same if the conversion rounds, which moves scores of experts by a few hundredths."""

BFLOAT16_BITS, SUM_BITS = 8, 22
"""Significant bits of bfloat16, and bits that simulate what the two libraries' orders of float32 sums differ by.
Measured on tiny models of 48 and 60 layers with delta nets and random weights of four seeds: with 22 bits, three times
the measured KL was 7 to 1,700 times the true one, which was 5e-6 to 1.3e-4. With 24 bits, those of float32, it was
below the true one in three of eight models."""

LARGEST_MARGIN, BLOCK_MARGIN = 3, 1.5
"""Factors on what the second run measured. The largest value of a token is one random draw against another. The mean of
a block can be off because the few biases of a router add up. The mean KL has no margin."""

WIDER = ("float32", "float16", "float64")
"""Dtypes with more significant bits than bfloat16, which has eight."""


@dataclass(frozen=True)
class Dither:
    """Noise that a second run adds to weights, to measure the effect of a loss of accuracy on the model.

    Attributes:
        leaves: Full paths of the leaves that get noise.
        bits: Each value moves up or down at random, by half a unit in the last place of this many significant bits.
    """

    leaves: frozenset[str]
    bits: int

    @property
    def is_rounding(self) -> bool:
        """Whether the noise stands for rounded weights, not for the error of float32 sums."""
        return self.bits == BFLOAT16_BITS


def tie_share(config: ForwardConfig, dither: Dither | None = None) -> float:
    """Returns the share by which scores may differ and still count as equal. `dither`: None if nothing is rounded."""
    rounded = ROUNDED_TIE if dither is not None and dither.is_rounding else 0
    return max(DELTA_NETS_TIE if _has_delta_nets(config) else EXACT_TIE, rounded)


def _has_delta_nets(config: ForwardConfig) -> bool:
    return any(isinstance(layer.attention, DeltaNet) for layer in config.layers)


def rounded_leaves(config: ForwardConfig, tensors: Mapping[str, TensorInfo], source_dtype: str) -> frozenset[str]:
    """Finds the leaves of a checkpoint whose values are rounded.

    Args:
        config: The model.
        tensors: The checkpoint's leaves by full path.
        source_dtype: Dtype of the original's weights, such as `float32`. Empty: unknown, taken as bfloat16.

    Returns:
        Their full paths.
    """
    return frozenset(
        name
        for name, info in tensors.items()
        if info.dtype == "bfloat16" and (source_dtype in WIDER or name.endswith(config.rounded))
    )


def dither_of(config: ForwardConfig, tensors: Mapping[str, TensorInfo], source_dtype: str) -> Dither | None:
    """Returns the noise of a second run that measures the threshold; None if EXACT_KL is the threshold.

    Args:
        config: The model.
        tensors: The checkpoint's leaves by full path.
        source_dtype: As in `rounded_leaves`.
    """
    if rounded := rounded_leaves(config, tensors, source_dtype):
        return Dither(rounded, BFLOAT16_BITS)
    return Dither(frozenset(tensors), SUM_BITS) if _has_delta_nets(config) else None


class Allowance:
    """The limits of a check, from the runs with and without dither.

    Attributes:
        max_kl: Limit on the KL of any token, in nats.
        mean_kl: Limit on the mean KL, in nats. None: there is none.
    """

    def __init__(self) -> None:
        self.max_kl: float = EXACT_KL
        self.mean_kl: float | None = None

    def of_blocks(self, found: blocks.States, dithered: blocks.States | None) -> Mapping[str, Relative]:
        """Returns the allowed error of each block by name. `dithered`: the outputs of the second run, if any."""
        allowed: dict[str, Relative] = defaultdict(lambda: EXACT_BLOCK)
        for name in dithered or {}:
            assert dithered is not None
            allowed[name] = self.of_block(relative_difference((found[name], dithered[name])))
        return allowed

    def of_block(self, measured: Relative | None) -> Relative:
        """Returns the allowed error of a block. `measured`: its error in the dithered run; None: there is none."""
        if measured is None or not measured.largest < float("inf"):
            return EXACT_BLOCK
        return Relative(
            mean=max(EXACT_BLOCK.mean, BLOCK_MARGIN * measured.mean),
            largest=max(EXACT_BLOCK.largest, LARGEST_MARGIN * measured.largest),
        )

    def of_logits(self, found: Sequence[Array], dithered: Sequence[Array]) -> None:
        """Sets `max_kl` and `mean_kl` from the logits of both runs, float32 (tokens, vocabulary) for each prompt."""
        measured = compare_logits(found, dithered)
        if measured.max_kl < float("inf"):
            self.max_kl = max(EXACT_KL, LARGEST_MARGIN * measured.max_kl)
            self.mean_kl = max(EXACT_KL, measured.mean_kl)
