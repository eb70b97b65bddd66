"""How far two sets of logits are apart, and where in the model they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from conversion_lib.errors import BadInput
from conversion_lib.sources.base import Array

ROWS = 64
"""Tokens compared at a time: in float64 a row of a large vocabulary is a megabyte, and there are several."""


class LayerDifference(BaseModel):
    """The stream behind one layer, in both models; -1 is the embedding, decoder layers count from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    layer: int
    max_abs_diff: float
    relative: float
    """The largest, over the tokens, of |difference| / |reference| (Euclidean)."""


@dataclass(frozen=True)
class Comparison:
    """Logits of the same tokens by two models; `kl` is float64 (tokens of all prompts,)."""

    kl: Array
    max_abs_diff: float
    top1: float
    top10: float

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
    """Compares logits prompt by prompt, float32 (tokens, vocabulary) each; shares are over all tokens.

    top1: share of tokens whose most likely next token is the same. top10: mean share of the ten most likely
    (of all, in a smaller vocabulary) that both have. Raises BadInput where shapes differ.
    """
    kl, largest, agree, overlap = [], [], [], []
    for index, (wanted, found) in enumerate(zip(reference, candidate, strict=True)):
        if wanted.shape != found.shape:
            raise BadInput(f"prompt {index}: the reference's logits are {wanted.shape}, the checkpoint's {found.shape}")
        for start in range(0, len(wanted), ROWS):
            a, b = wanted[start : start + ROWS], found[start : start + ROWS]
            with np.errstate(invalid="ignore", over="ignore"):
                kl.append(kl_per_token(a, b))
                difference = float(np.max(np.abs(a.astype(np.float64) - b)))
            largest.append(difference if np.isfinite(difference) else np.inf)
            best_a, best_b = top_tokens(a, 10), top_tokens(b, 10)
            agree.append(best_a[:, 0] == best_b[:, 0])
            overlap.append((best_a[:, :, None] == best_b[:, None, :]).any(-1).mean(-1))
    return Comparison(
        kl=np.concatenate(kl),
        max_abs_diff=max(largest),
        top1=float(np.mean(np.concatenate(agree))),
        top10=float(np.mean(np.concatenate(overlap))),
    )


def compare_layer(layer: int, reference: Array, candidate: Array) -> LayerDifference:
    """The stream behind `layer`, float32 (tokens, hidden), in the reference and in the checkpoint."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        difference = candidate.astype(np.float64) - reference
        length = np.linalg.norm(reference.astype(np.float64), axis=-1)
        distance = np.linalg.norm(difference, axis=-1)
        relative = np.where(distance == 0, 0.0, distance / length)
    return LayerDifference(
        layer=layer, max_abs_diff=float(np.max(np.abs(difference))), relative=float(np.max(relative))
    )


def first_departing(layers: Sequence[LayerDifference], tolerance: float) -> int | None:
    """The first layer whose relative difference is above `tolerance` (or not a number); None where none is."""
    return next((entry.layer for entry in layers if not entry.relative <= tolerance), None)
