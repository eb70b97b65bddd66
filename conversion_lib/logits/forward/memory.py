"""How a check divides its memory budget."""

from __future__ import annotations

from dataclasses import dataclass

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.config import Attention, ForwardConfig, GroupedQuery, Latent, Moe

PROGRAM = 1 << 30
"""Bytes of Python with torch, transformers, jax and their compiled code: measured 0.9 GB on small models."""

LARGEST_SLICE = 256 << 20
SMALLEST_SLICE = 1 << 20
COPIES = 5
"""Copies of a slice of weights: as read, as float32, and those of the previous product that are not yet released."""

LARGEST_SCORES = 128 << 20
SMALLEST_SCORES = 4 << 20
SCORE_COPIES = 6
"""Copies of a block of attention scores: scaled, masked, after softmax; the most that either side holds."""


@dataclass(frozen=True)
class Memory:
    """What a forward pass may hold at a time.

    Attributes:
        slice_bytes: Bytes of float32 weights.
        score_bytes: Bytes of float32 attention scores.
    """

    slice_bytes: int = LARGEST_SLICE
    score_bytes: int = LARGEST_SCORES


def divide(budget: int, config: ForwardConfig, tokens: int) -> Memory:
    """Divides the memory budget of a check.

    Args:
        budget: Bytes, for the whole process.
        config: The model.
        tokens: Tokens of all prompts.

    Raises:
        BadInput: The budget is too small for what cannot be sliced: the logits of both sides, the residual streams,
            the masks, one expert. The message names the smallest budget.
    """
    logits = 5 * 4 * tokens * config.vocab
    wide = max(config.hidden, *(_width(layer.attention) for layer in config.layers))
    streams = 4 * tokens * (30 * config.hidden + 3 * wide)
    masks = 4 * 4 * tokens**2
    expert = max(
        (
            3 * 4 * config.hidden * layer.feed_forward.width
            for layer in config.layers
            if isinstance(layer.feed_forward, Moe)
        ),
        default=0,
    )
    # logits exist only after the last layer, masks only before that
    held = PROGRAM + streams + max(logits, masks)
    heads = max(config.heads, *(_indexed_heads(layer.attention) for layer in config.layers))
    least_scores = max(SMALLEST_SCORES, 4 * heads * tokens)  # at least one query
    least = held + SCORE_COPIES * least_scores + max(2 * expert, COPIES * SMALLEST_SLICE)
    if least > budget:
        raise BadInput(
            f"--memory-budget {_gib(budget)}: checking {tokens} tokens of this model takes at least {_gib(least)}; "
            "raise the budget, or check fewer --tokens"
        )
    score_bytes = min(LARGEST_SCORES, max(least_scores, (budget - held) // (2 * SCORE_COPIES)))
    slice_bytes = min(LARGEST_SLICE, (budget - held - SCORE_COPIES * score_bytes) // COPIES)
    return Memory(slice_bytes=max(slice_bytes, SMALLEST_SLICE), score_bytes=score_bytes)


def _width(attention: Attention) -> int:
    """Floats that attention holds for each token: query, keys, values and the output of the heads."""
    if isinstance(attention, GroupedQuery):
        return (2 * attention.heads + 2 * attention.kv_heads) * attention.head_dim
    if isinstance(attention, Latent):
        return attention.heads * (2 * (attention.nope_dim + attention.rope.dim) + 2 * attention.value_dim)
    return 2 * attention.convolved + 2 * attention.value_heads * attention.value_dim


def _indexed_heads(attention: Attention) -> int:
    return attention.indexer.heads if isinstance(attention, Latent) and attention.indexer is not None else 0


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}GiB"
