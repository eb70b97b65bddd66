"""How far two sets of logits are apart, and where in the model the difference begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput
from conversion_lib.logits.verdict import blocks

ROWS = 32
"""Tokens that a thread compares at a time: with a large vocabulary, a row takes several megabytes in float64."""

THREADS = 2

HISTOGRAM_EDGES = np.concatenate([[0.0], np.logspace(-9, 3, 49), [np.inf]])
"""Bins for differences between logits, four for each decade. The first holds equal and almost equal logits."""


class Relative(BaseModel):
    """Relative error of vectors, |difference| / |reference| (Euclidean): mean over the tokens, and the largest."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    mean: float
    largest: float


class BlockDifference(BaseModel):
    """The difference in the output of one block, from inputs that are equal or almost equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    relative: Relative
    allowed: Relative
    """What the order of float32 sums and the conversion's rounding explain."""

    @property
    def departs(self) -> bool:
        """Whether the block differs by more than is allowed, or is not finite."""
        return not (self.relative.mean <= self.allowed.mean and self.relative.largest <= self.allowed.largest)


class LayerDifference(BaseModel):
    """The difference in one layer. Layer -1 is the embedding; decoder layers count from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    layer: int
    max_abs_diff: float
    """Of the residual stream after the layer, to which all layers so far have added."""
    relative: float
    """Of the same stream: the largest relative error of a token."""
    blocks: dict[str, BlockDifference]
    """In the order in which the layer computes them."""

    @property
    def departs(self) -> bool:
        """Whether one of its blocks departs."""
        return any(block.departs for block in self.blocks.values())


class Spot(BaseModel):
    """A block of a layer, where a difference begins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    block: str

    @property
    def order(self) -> tuple[int, int]:
        """By which spots are sorted: as the model comes to them."""
        return self.layer, blocks.ORDER.index(self.block)

    def __str__(self) -> str:
        return "the embedding" if self.layer == blocks.EMBEDDING_LAYER else f"layer {self.layer}, {self.block}"


@dataclass(frozen=True)
class Comparison:
    """The differences between two models' logits of the same tokens.

    top10, jaccard and rank_agreement are means over the tokens. They compare the ten most likely next tokens of each
    model, or all in a smaller vocabulary.

    Attributes:
        kl: KL(reference || candidate) of each token in nats, float64 (tokens of all prompts,).
        max_abs_diff: The largest difference of a logit; infinite where one is not finite.
        top1: Share of tokens with the same most likely next token.
        top10: Share of the ten that both have.
        jaccard: Tokens that both have, divided by tokens that either has.
        rank_agreement: Share of ranks that hold the same token.
        histogram: Number of logit differences between the HISTOGRAM_EDGES, int64 (edges - 1,).
    """

    kl: Array
    max_abs_diff: float
    top1: float
    top10: float
    jaccard: float
    rank_agreement: float
    histogram: Array

    @property
    def max_kl(self) -> float:
        """The largest KL of a token, in nats."""
        return float(np.max(self.kl))

    @property
    def mean_kl(self) -> float:
        """The mean KL over the tokens, in nats."""
        return float(np.mean(self.kl))


def log_softmax(logits: Array) -> Array:
    """Computes log(softmax(logits)) over the last axis, in float64."""
    shifted = logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return result


def kl_per_token(reference: Array, candidate: Array) -> Array:
    """Computes the KL divergence of the next-token distributions, KL(reference || candidate).

    Args:
        reference: Logits, (tokens, vocabulary).
        candidate: Logits, (tokens, vocabulary).

    Returns:
        Nats, float64 (tokens,). Infinite where either row has a NaN or an infinity.
    """
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    # rounding alone can push a sum of zeros below zero, by 1e-16
    kl = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), 0.0)
    finite = np.isfinite(reference).all(axis=-1) & np.isfinite(candidate).all(axis=-1)
    return np.where(finite, kl, np.inf)


def top_tokens(logits: Array, count: int) -> Array:
    """Finds the ids of the largest logits of each row.

    Args:
        logits: (tokens, vocabulary).
        count: How many; all of them in a smaller vocabulary.

    Returns:
        int64 (tokens, count), the largest first; among equal ones, the lower id first.
    """
    count = min(count, logits.shape[-1])
    best = np.sort(np.argpartition(-logits, count - 1, axis=-1)[:, :count], axis=-1)
    order = np.argsort(-np.take_along_axis(logits, best, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(best, order, axis=-1)


def compare_logits(reference: Sequence[Array], candidate: Sequence[Array]) -> Comparison:
    """Compares the logits of two models.

    Args:
        reference: The original's logits, float32 (tokens, vocabulary) for each prompt.
        candidate: The checkpoint's, in the same shapes.

    Raises:
        BadInput: The shapes differ.
    """
    pieces = []
    for index, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
        if expected.shape != found.shape:
            raise BadInput(
                f"prompt {index}: the reference's logits are {expected.shape}, the checkpoint's {found.shape}"
            )
        pieces += [
            (expected[start : start + ROWS], found[start : start + ROWS]) for start in range(0, len(expected), ROWS)
        ]
    with ThreadPoolExecutor(THREADS) as pool:
        kl, largest, histograms, best = zip(*pool.map(_compare_rows, pieces), strict=True)
    histogram = np.sum(histograms, axis=0)
    expected_best, found_best = np.concatenate(best, axis=1)
    shared = (expected_best[:, :, None] == found_best[:, None, :]).any(-1).sum(-1)
    count = expected_best.shape[1]
    return Comparison(
        kl=np.concatenate(kl),
        max_abs_diff=max(largest) if np.isfinite(largest).all() else np.inf,
        top1=float(np.mean(expected_best[:, 0] == found_best[:, 0])),
        top10=float(np.mean(shared / count)),
        jaccard=float(np.mean(shared / (2 * count - shared))),
        rank_agreement=float(np.mean(expected_best == found_best)),
        histogram=histogram,
    )


def _compare_rows(piece: tuple[Array, Array]) -> tuple[Array, float, Array, Array]:
    """For some tokens: KL, the largest difference, the histogram, and the ten most likely of both, (2, tokens, 10)."""
    a, b = piece
    with np.errstate(invalid="ignore", over="ignore"):
        kl = kl_per_token(a, b)
        difference = np.abs(a.astype(np.float64) - b)
        finite = np.isfinite(difference)
    within = difference if finite.all() else difference[finite]
    histogram = np.histogram(within, HISTOGRAM_EDGES)[0]
    return kl, float(np.max(difference)), histogram, np.stack([top_tokens(a, 10), top_tokens(b, 10)])


def relative_difference(*pairs: tuple[Array, Array]) -> Relative:
    """Computes the relative error over the tokens of all pairs.

    Args:
        pairs: (reference, candidate), float32 (tokens, width) each. Equal vectors have an error of 0, zeros too.
    """
    ratios = np.concatenate([_ratios(reference, candidate) for reference, candidate in pairs])
    return Relative(mean=float(np.mean(ratios)), largest=float(np.max(ratios)))


def _ratios(reference: Array, candidate: Array) -> Array:
    """|difference| / |reference|, float64 (tokens,); a few tokens at a time, since logits are wide."""
    ratios = np.empty(len(reference))
    for start in range(0, len(reference), ROWS):
        rows = slice(start, start + ROWS)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            distance, length = _lengths(candidate[rows] - reference[rows]), _lengths(reference[rows])
            ratios[rows] = np.where(distance == 0, 0.0, distance / length)
    return ratios


def _lengths(rows: Array) -> Array:
    """Euclidean lengths, float64 (tokens,)."""
    squares: Array = np.einsum("tw,tw->t", rows, rows, dtype=np.float64)
    return np.sqrt(squares)


def compare_layer(
    layer: int, reference: blocks.States, candidate: blocks.States, allowed: Mapping[str, Relative]
) -> LayerDifference:
    """Compares a layer of the reference and of the checkpoint.

    Args:
        layer: Its number.
        reference: Outputs of the original's blocks.
        candidate: Outputs of the checkpoint's blocks.
        allowed: The largest allowed error of each block, by name.
    """
    last = next(block for block in reversed(blocks.ORDER) if block in reference and block in candidate)
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.max(np.abs(candidate[last] - reference[last]))
    return LayerDifference(
        layer=layer,
        max_abs_diff=float(largest),
        relative=relative_difference((reference[last], candidate[last])).largest,
        blocks=compare_blocks(reference, candidate, allowed),
    )


def compare_blocks(
    reference: blocks.States, candidate: blocks.States, allowed: Mapping[str, Relative]
) -> dict[str, BlockDifference]:
    """Compares the blocks of a layer that both sides have. `allowed`: the largest allowed error of each, by name."""
    return {
        block: BlockDifference(
            relative=relative_difference((reference[block], candidate[block])), allowed=allowed[block]
        )
        for block in blocks.ORDER
        if block in reference and block in candidate
    }


def first_departing(layers: Sequence[LayerDifference]) -> Spot | None:
    """Returns the first block of the first layer that departs; None if none does."""
    return next(
        (
            Spot(layer=entry.layer, block=name)
            for entry in layers
            for name, block in entry.blocks.items()
            if block.departs
        ),
        None,
    )


def not_finite(layer: int, states: blocks.States) -> Spot | None:
    """Returns the first block whose output has a NaN or an infinity; None if all are finite."""
    lost = (name for name in blocks.ORDER if name in states and not np.isfinite(states[name]).all())
    return next((Spot(layer=layer, block=name) for name in lost), None)
