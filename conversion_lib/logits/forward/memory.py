"""How a check divides its memory budget."""

from __future__ import annotations

from dataclasses import dataclass

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.config import Attention, ForwardConfig, GroupedQuery, Latent, Moe

PROGRAM = 1 << 30
"""Python with torch, transformers, jax and their compiled code: measured 0.9 GB on small models."""

LARGEST_SLICE = 256 << 20
SMALLEST_SLICE = 1 << 20
COPIES = 5
"""A slice of weights in use: as read, as float32, those of the product before it that are not yet let go."""

LARGEST_SCORES = 128 << 20
SMALLEST_SCORES = 4 << 20
SCORE_COPIES = 6
"""A block of attention scores in use: scaled, masked, their softmax, as original and checkpoint hold them at worst."""


@dataclass(frozen=True)
class Memory:
    """slice_bytes: float32 weights held at a time. score_bytes: float32 attention scores held at a time."""

    slice_bytes: int = LARGEST_SLICE
    score_bytes: int = LARGEST_SCORES


def divide(budget: int, config: ForwardConfig, tokens: int) -> Memory:
    """What each part of a check of `tokens` tokens may take of `budget` bytes.

    Raises BadInput where the budget does not hold what cannot be sliced: the logits of both sides, the streams, the
    masks, one expert.
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
    # logits are there after the last layer, scores and weights before
    held = PROGRAM + streams + max(logits, masks)
    heads = max(config.heads, *(_indexed_heads(layer.attention) for layer in config.layers))
    least_scores = max(SMALLEST_SCORES, 4 * heads * tokens)  # one query at the least
    least = held + SCORE_COPIES * least_scores + max(2 * expert, COPIES * SMALLEST_SLICE)
    if least > budget:
        raise BadInput(
            f"--memory-budget {_gib(budget)}: checking {tokens} tokens of this model takes at least {_gib(least)}; "
            "give more, or fewer --tokens"
        )
    score_bytes = min(LARGEST_SCORES, max(least_scores, (budget - held) // (2 * SCORE_COPIES)))
    slice_bytes = min(LARGEST_SLICE, (budget - held - SCORE_COPIES * score_bytes) // COPIES)
    return Memory(slice_bytes=max(slice_bytes, SMALLEST_SLICE), score_bytes=score_bytes)


def _width(attention: Attention) -> int:
    """Of what attention holds of each token: query, keys, values, and what the heads put out."""
    if isinstance(attention, GroupedQuery):
        return (2 * attention.heads + 2 * attention.kv_heads) * attention.head_dim
    if isinstance(attention, Latent):
        return attention.heads * (2 * (attention.nope_dim + attention.rope.dim) + 2 * attention.value_dim)
    return 2 * attention.convolved + 2 * attention.value_heads * attention.value_dim


def _indexed_heads(attention: Attention) -> int:
    return attention.indexer.heads if isinstance(attention, Latent) and attention.indexer is not None else 0


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}GiB"
