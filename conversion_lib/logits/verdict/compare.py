"""How far two sets of logits are apart, and where in the model they part."""

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
"""Tokens that a thread compares at a time: a row of a large vocabulary is a megabyte in float64, several times."""

THREADS = 2

HISTOGRAM_EDGES = np.concatenate([[0.0], np.logspace(-9, 3, 49), [np.inf]])
"""Of differences between logits: four bins a decade; what is equal or next to it lies in the first."""


class Relative(BaseModel):
    """How far off vectors are, one a token: |difference| / |reference| (Euclidean), the mean and the largest."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    mean: float
    largest: float


class BlockDifference(BaseModel):
    """What one block of a layer puts out, in both models, from inputs that are the same or next to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    relative: Relative
    allowed: Relative
    """What float32 sums and the plan's rounding explain."""

    @property
    def departs(self) -> bool:
        return not (self.relative.mean <= self.allowed.mean and self.relative.largest <= self.allowed.largest)


class LayerDifference(BaseModel):
    """One layer in both models; -1 is the embedding, decoder layers count from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    layer: int
    max_abs_diff: float
    """Of the stream behind the layer, which holds what all layers so far have added up to."""
    relative: float
    """Of the same, the largest of a token."""
    blocks: dict[str, BlockDifference]
    """In the order in which the layer computes them."""

    @property
    def departs(self) -> bool:
        return any(block.departs for block in self.blocks.values())


class Spot(BaseModel):
    """A block of a layer, where something begins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    block: str

    def __str__(self) -> str:
        return "the embedding" if self.layer == blocks.EMBEDDING_LAYER else f"layer {self.layer}, {self.block}"


@dataclass(frozen=True)
class Comparison:
    """Logits of the same tokens by two models; `kl` is float64 (tokens of all prompts,).

    top1: share of tokens whose most likely next token is the same. Of the ten most likely of each (of all, in a
    smaller vocabulary), as means over the tokens: top10, the share that both have; jaccard, shared over all that
    either has; rank_agreement, the share of ranks that hold the same token. histogram: how many differences of logits
    lie between HISTOGRAM_EDGES.
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
        return float(np.max(self.kl))

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return result


def kl_per_token(reference: Array, candidate: Array) -> Array:
    """KL(reference || candidate) in nats, float64 (tokens,), for logits (tokens, vocabulary).

    Infinite where either row has a NaN or an infinity: no distance can be told there.
    """
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    # by rounding alone a sum of zeros can fall below zero, by 1e-16
    kl = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), 0.0)
    finite = np.isfinite(reference).all(axis=-1) & np.isfinite(candidate).all(axis=-1)
    return np.where(finite, kl, np.inf)


def top_tokens(logits: Array, count: int) -> Array:
    """The ids of the `count` largest logits of each row (all, where there are fewer), largest first; of equal
    ones among them the lower id first. logits: (tokens, vocabulary)."""
    count = min(count, logits.shape[-1])
    best = np.sort(np.argpartition(-logits, count - 1, axis=-1)[:, :count], axis=-1)
    order = np.argsort(-np.take_along_axis(logits, best, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(best, order, axis=-1)


def compare_logits(reference: Sequence[Array], candidate: Sequence[Array]) -> Comparison:
    """Compares logits prompt by prompt, float32 (tokens, vocabulary) each. Raises BadInput where shapes differ."""
    pieces = []
    for index, (wanted, found) in enumerate(zip(reference, candidate, strict=True)):
        if wanted.shape != found.shape:
            raise BadInput(f"prompt {index}: the reference's logits are {wanted.shape}, the checkpoint's {found.shape}")
        pieces += [(wanted[start : start + ROWS], found[start : start + ROWS]) for start in range(0, len(wanted), ROWS)]
    with ThreadPoolExecutor(THREADS) as pool:
        kl, largest, histograms, best = zip(*pool.map(_compare_rows, pieces), strict=True)
    histogram = np.sum(histograms, axis=0)
    wanted_best, found_best = np.concatenate(best, axis=1)
    shared = (wanted_best[:, :, None] == found_best[:, None, :]).any(-1).sum(-1)
    count = wanted_best.shape[1]
    return Comparison(
        kl=np.concatenate(kl),
        max_abs_diff=max(largest) if np.isfinite(largest).all() else np.inf,
        top1=float(np.mean(wanted_best[:, 0] == found_best[:, 0])),
        top10=float(np.mean(shared / count)),
        jaccard=float(np.mean(shared / (2 * count - shared))),
        rank_agreement=float(np.mean(wanted_best == found_best)),
        histogram=histogram,
    )


def _compare_rows(piece: tuple[Array, Array]) -> tuple[Array, float, Array, Array]:
    """Of some tokens: KL, the largest difference of a logit, the histogram, the ten most likely of both, (2, tokens,
    10)."""
    a, b = piece
    with np.errstate(invalid="ignore", over="ignore"):
        kl = kl_per_token(a, b)
        difference = np.abs(a.astype(np.float64) - b)
        finite = np.isfinite(difference)
    within = difference if finite.all() else difference[finite]
    histogram = np.histogram(within, HISTOGRAM_EDGES)[0]
    return kl, float(np.max(difference)), histogram, np.stack([top_tokens(a, 10), top_tokens(b, 10)])


def relative_difference(*pairs: tuple[Array, Array]) -> Relative:
    """How far the second of each pair is from the first, the reference's, both float32 (tokens, width), over the tokens
    of all pairs. Equal tokens are 0 off, also zeros."""
    ratios = np.concatenate([_ratios(wanted, found) for wanted, found in pairs])
    return Relative(mean=float(np.mean(ratios)), largest=float(np.max(ratios)))


def _ratios(wanted: Array, found: Array) -> Array:
    """|difference| / |wanted|, float64 (tokens,); a few tokens at a time, since logits are wide."""
    ratios = np.empty(len(wanted))
    for start in range(0, len(wanted), ROWS):
        rows = slice(start, start + ROWS)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            distance, length = _lengths(found[rows] - wanted[rows]), _lengths(wanted[rows])
            ratios[rows] = np.where(distance == 0, 0.0, distance / length)
    return ratios


def _lengths(rows: Array) -> Array:
    """Euclidean, float64 (tokens,)."""
    squares: Array = np.einsum("tw,tw->t", rows, rows, dtype=np.float64)
    return np.sqrt(squares)


def compare_layer(
    layer: int, reference: blocks.States, candidate: blocks.States, allowed: Mapping[str, Relative]
) -> LayerDifference:
    """What `layer` puts out in the reference and in the checkpoint. allowed: by block."""
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
    """What the blocks of a layer put out in both; those that one of them does not tell apart are left out."""
    return {
        block: BlockDifference(
            relative=relative_difference((reference[block], candidate[block])), allowed=allowed[block]
        )
        for block in blocks.ORDER
        if block in reference and block in candidate
    }


def first_departing(layers: Sequence[LayerDifference]) -> Spot | None:
    """The first block of the first layer that differs by more than is allowed; None where none does."""
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
    """The first block whose output has a NaN or an infinity."""
    lost = (name for name in blocks.ORDER if name in states and not np.isfinite(states[name]).all())
    return next((Spot(layer=layer, block=name) for name in lost), None)
