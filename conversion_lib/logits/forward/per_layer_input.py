"""The per-layer inputs of Gemma 4's small models: made from the token id and its embedding, one for each layer."""

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
    """Computes the inputs of all layers, as `Gemma4TextModel.project_per_layer_inputs` of transformers.

    (second embedding · sqrt(width) + norm(projection of the embedding / sqrt(hidden))) / sqrt(2).

    Args:
        tokens: Token ids, int (tokens,).
        stream: The embedding, scaled as the model does it, float32 (tokens, hidden).
        top: Weights outside the layers.
        config: The width of an input.
        eps: Epsilon of the norm.

    Returns:
        float32 (layers, tokens, width).
    """
    known = embed(tokens, top, f"{PER_LAYER}/embed_tokens_per_layer") * config.width**0.5
    seen = top.contract(stream, f"{PER_LAYER}/per_layer_model_projection/kernel") * stream.shape[-1] ** -0.5
    known, seen = (part.reshape(len(tokens), -1, config.width) for part in (known, seen))
    seen = rms_norm(seen, top.read(f"{PER_LAYER}/per_layer_projection_norm/scale"), eps)
    return jnp.moveaxis((known + seen) * 2**-0.5, 1, 0)


def add_per_layer_input(
    stream: jax.Array, own: jax.Array, leaves: Leaves, config: PerLayerInput, eps: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Adds a layer's per-layer input to the stream, as the end of transformers' `Gemma4TextDecoderLayer`.

    Args:
        stream: The residual stream after the MLP, float32 (tokens, hidden).
        own: The layer's own input, float32 (tokens, width).
        leaves: The layer's weights.
        config: Width and activation.
        eps: Epsilon of the norm.

    Returns:
        The new stream, float32 (tokens, hidden), and the outputs of the blocks.
    """
    gate = ACTIVATIONS[config.activation](leaves.contract(stream, "per_layer_input_gate/kernel"))
    out = leaves.contract(gate * own, "per_layer_projection/kernel")
    normed = rms_norm(out, leaves.read("post_per_layer_input_norm/scale"), eps)
    return stream + normed, {blocks.PER_LAYER_INPUT: out, blocks.NORM_AFTER_PER_LAYER_INPUT: normed}
