"""Logits of a MaxText checkpoint, computed layer by layer from its own files.

One layer's weights are held at a time, in slices, so that memory does not grow with the model. Everything
is float32, products at the highest precision. Nothing here knows the converter's tables: paths and shapes
come from `layout.py`, so that a mistake there is not made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.boxes import size, whole
from conversion_lib.dtypes import itemsize
from conversion_lib.logits.attention import attention, lay_out, rms_norm
from conversion_lib.logits.config import ForwardConfig
from conversion_lib.logits.layout import EMBEDDING, FINAL_NORM, NORM_BEFORE_ATTENTION, NORM_BEFORE_MLP, OUTPUT
from conversion_lib.logits.moe import feed_forward
from conversion_lib.logits.weights import BiasOrder, Checkpoint, Leaves, Weights
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.sources.base import Array

EMBEDDING_LAYER = -1
"""The number under which the embedding's output is observed; decoder layers count from 0."""

Observer = Callable[[int, Array], None]


@dataclass(frozen=True)
class ForwardResult:
    """logits: for each prompt float32 (tokens, vocabulary). idle_experts: (layer, expert) pairs without a token."""

    logits: list[Array]
    idle_experts: int


def forward(
    checkpoint: Checkpoint,
    config: ForwardConfig,
    prompts: Sequence[Array],
    *,
    bias_order: BiasOrder | None = None,
    observe: Observer | None = None,
    reporter: Reporter = SILENT,
) -> ForwardResult:
    """The logits of `prompts` (integers, (tokens,) each), by the weights of `checkpoint`.

    bias_order: the layout of a scanned DeepSeek-V3 gate bias where it is known. observe: called with the number
    of each layer and the stream behind it, float32 (all prompts' tokens, hidden), EMBEDDING_LAYER first.

    Raises BadInput where a leaf is missing, left over, or disagrees with `config`.
    """
    total = sum(size(whole(info.shape)) * itemsize(info.dtype) for info in checkpoint.tensors.values())
    with jax.default_matmul_precision("highest"), reporter.task("logits of the checkpoint", total) as task:
        weights = Weights(checkpoint, config, bias_order, task)
        sequence = lay_out(config, [len(prompt) for prompt in prompts])
        stream = embed(np.concatenate(list(prompts)), weights.top)
        idle = 0
        if observe is not None:
            observe(EMBEDDING_LAYER, np.asarray(stream))
        for layer in range(config.layers):
            leaves = weights.layer(layer)
            normed = rms_norm(stream, leaves.read(NORM_BEFORE_ATTENTION), config.eps)
            stream = stream + attention(normed, leaves, config, sequence)
            normed = rms_norm(stream, leaves.read(NORM_BEFORE_MLP), config.eps)
            added, unvisited = feed_forward(normed, leaves, config, layer)
            stream, idle = stream + added, idle + unvisited
            if observe is not None:
                observe(layer, np.asarray(stream))
        logits = np.asarray(unembed(stream, weights.top, config))
    ends = np.cumsum([len(prompt) for prompt in prompts])[:-1]
    return ForwardResult(np.split(logits, ends), idle)


def embed(tokens: Array, top: Leaves) -> jax.Array:
    """Rows of the embedding, float32 (tokens, hidden); the vocabulary is read in slices."""
    stream = np.zeros((len(tokens), top.shapes[EMBEDDING][1]), np.float32)
    for start, stop in top.slices(EMBEDDING):
        here = (tokens >= start) & (tokens < stop)
        if here.any():
            stream[here] = np.asarray(top.read(EMBEDDING, (start, stop)))[tokens[here] - start]
    return jnp.asarray(stream)


def unembed(stream: jax.Array, top: Leaves, config: ForwardConfig) -> jax.Array:
    """Final norm and output projection, float32 (tokens, vocabulary); a tied model uses its embedding."""
    normed = rms_norm(stream, top.read(FINAL_NORM), config.eps)
    if not config.tied:
        return top.contract(normed, OUTPUT)
    return jnp.concatenate([normed @ top.read(EMBEDDING, rows).T for rows in top.slices(EMBEDDING)], axis=1)
