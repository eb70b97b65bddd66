"""Gemma 4's small models: what each layer takes in besides the stream, made of the token and of its embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.attention import rms_norm
from conversion_lib.logits.forward.config import PerLayerInput
from conversion_lib.logits.forward.layout import PER_LAYER
from conversion_lib.logits.forward.moe import ACTIVATIONS
from conversion_lib.logits.forward.weights import Leaves, embed
from conversion_lib.logits.verdict import blocks


def per_layer_inputs(tokens: Array, stream: jax.Array, top: Leaves, config: PerLayerInput, eps: float) -> jax.Array:
    """The inputs of all layers, float32 (layers, tokens, width); stream: the embedding, float32 (tokens, hidden).

    The sum of two parts over the root of two: the second embedding times the root of its width, and a projection of
    the first one over the root of its own, normed.
    """
    known = embed(tokens, top, f"{PER_LAYER}/embed_tokens_per_layer") * config.width**0.5
    seen = top.contract(stream, f"{PER_LAYER}/per_layer_model_projection/kernel") * stream.shape[-1] ** -0.5
    known, seen = (part.reshape(len(tokens), -1, config.width) for part in (known, seen))
    seen = rms_norm(seen, top.read(f"{PER_LAYER}/per_layer_projection_norm/scale"), eps)
    return jnp.moveaxis((known + seen) * 2**-0.5, 1, 0)


def add_per_layer_input(
    stream: jax.Array, own: jax.Array, leaves: Leaves, config: PerLayerInput, eps: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The stream with what a layer makes of its `own` input, (tokens, width), and what the blocks put out."""
    gate = ACTIVATIONS[config.activation](leaves.contract(stream, "per_layer_input_gate/kernel"))
    out = leaves.contract(gate * own, "per_layer_projection/kernel")
    normed = rms_norm(out, leaves.read("post_per_layer_input_norm/scale"), eps)
    return stream + normed, {blocks.PER_LAYER_INPUT: out, blocks.NORM_AFTER_PER_LAYER_INPUT: normed}
