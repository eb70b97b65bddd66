"""How a check divides its memory budget."""

from __future__ import annotations

from dataclasses import dataclass

from conversion_lib.errors import BadInput
from conversion_lib.logits.config import ForwardConfig, Moe

PROGRAM = 1 << 30
"""Python with torch, transformers, jax and their compiled code: measured 0.9 GB on small models."""

LARGEST_SLICE = 256 << 20
SMALLEST_SLICE = 1 << 20
COPIES = 5
"""A slice of weights in use: as read, as float32, those of the product before it that are not yet let go."""


@dataclass(frozen=True)
class Memory:
    """slice_bytes: float32 weights held at a time. score_bytes: float32 attention scores held at a time."""

    slice_bytes: int = LARGEST_SLICE
    score_bytes: int = LARGEST_SLICE


def divide(budget: int, config: ForwardConfig, tokens: int) -> Memory:
    """What each part of a check of `tokens` tokens may take of `budget` bytes.

    Raises BadInput where the budget does not hold what cannot be sliced: the logits of both sides, the streams,
    one expert, and the attention scores, of which transformers makes all of a layer at once.
    """
    logits = 4 * 4 * tokens * config.vocab
    streams = 30 * 4 * tokens * config.hidden
    scores = 4 * 4 * config.heads * tokens**2
    expert = max(
        (
            3 * 4 * config.hidden * layer.feed_forward.width
            for layer in config.layers
            if isinstance(layer.feed_forward, Moe)
        ),
        default=0,
    )
    # logits are there after the last layer, scores and weights before
    held = PROGRAM + streams + max(logits, scores)
    least = held + max(2 * expert, COPIES * SMALLEST_SLICE)
    if least > budget:
        raise BadInput(
            f"--memory-budget {_gib(budget)}: checking {tokens} tokens of this model takes at least {_gib(least)}; "
            "give more, or fewer --tokens"
        )
    return Memory(slice_bytes=min(LARGEST_SLICE, (budget - held) // COPIES), score_bytes=LARGEST_SLICE)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}GiB"
