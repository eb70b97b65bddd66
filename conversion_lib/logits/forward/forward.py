"""Logits of a MaxText checkpoint, computed layer by layer from its own files.

Only slices of one layer's weights are held at a time, so that memory does not grow with the model. Everything is
float32, with matrix products at the highest precision. Nothing here uses the converter's tables: paths and shapes come
from `layout.py`, so that a mistake in those tables is not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.attention import (
    KeysAndValues,
    Prompts,
    grouped_query_attention,
    latent_attention,
    rms_norm,
)
from conversion_lib.logits.forward.config import ForwardConfig, GroupedQuery, Latent, Layer
from conversion_lib.logits.forward.delta_net import delta_net
from conversion_lib.logits.forward.layout import EMBEDDING, FINAL_NORM, LAYER_SCALAR, OUTPUT
from conversion_lib.logits.forward.memory import Memory
from conversion_lib.logits.forward.moe import feed_forward
from conversion_lib.logits.forward.per_layer_input import add_per_layer_input, per_layer_inputs
from conversion_lib.logits.forward.weights import BiasOrder, Checkpoint, Leaves, Weights, embed
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.rounding import Dither, tie_share
from conversion_lib.progress import Task


@dataclass(frozen=True)
class _Computed:
    """The stream after a layer, the outputs of its blocks, and the number of its experts that received no token."""

    stream: jax.Array
    states: blocks.States
    idle: int


class ForwardPass:
    """One run of prompts through the weights of a checkpoint: first `layers`, then `logits`.

    Args:
        checkpoint: Read during the run; the caller keeps it open.
        config: The model.
        prompts: Token ids, int (tokens,) each.
        bias_order: Layout of a scanned DeepSeek-V3 gate bias, as in `Weights`.
        memory: How many bytes to hold at a time.
        dither: Noise on the weights, as in `Weights`.
        tie: Scores that differ by at most this share count as equal. None: the share for unrounded weights.
        task: Advanced by the bytes read.

    Attributes:
        idle_experts: (layer, expert) pairs that received no token so far.
        original: Set this before each layer to the outputs of the original's blocks in that layer, where known. Among
            experts, or indexed tokens, with equal scores, the original's choice is then used.

    Raises:
        BadInput: A leaf is missing, left over, or does not match `config`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ForwardConfig,
        prompts: Sequence[Array],
        *,
        bias_order: BiasOrder | None = None,
        memory: Memory | None = None,
        dither: Dither | None = None,
        tie: float | None = None,
        task: Task | None = None,
    ) -> None:
        self._config, self._prompts = config, prompts
        self._tie = tie_share(config) if tie is None else tie
        self._weights = Weights(checkpoint, config, bias_order=bias_order, memory=memory, dither=dither, task=task)
        self._sequence = Prompts([len(prompt) for prompt in prompts], self._weights.memory.score_bytes)
        self._stream: jax.Array | None = None
        self._own_inputs: jax.Array | None = None
        self._keys_and_values: dict[int, KeysAndValues] = {}
        self._originals_keys_and_values: dict[int, KeysAndValues] = {}
        attentions = [layer.attention for layer in config.layers]
        self._taken_from = {a.keys_from for a in attentions if isinstance(a, GroupedQuery)}
        self.idle_experts = 0
        self.original: blocks.States | None = None

    def layers(self) -> Iterator[tuple[int, blocks.States]]:
        """Runs the layers one by one, the embedding first.

        Yields:
            The number of the layer, `blocks.EMBEDDING_LAYER` for the embedding, and the outputs of its blocks.
        """
        tokens = np.concatenate(list(self._prompts))
        top, own = self._weights.top, self._config.per_layer_input
        self._stream = embed(tokens, top, EMBEDDING)
        yield blocks.EMBEDDING_LAYER, {blocks.EMBEDDING: np.asarray(self._stream)}
        with jax.default_matmul_precision("highest"):
            if own is not None:
                self._own_inputs = per_layer_inputs(tokens, self._stream, top, own, self._config.eps)
        for number in range(len(self._config.layers)):
            computed = self._layer(self._stream, number, self.original, self._keys_and_values)
            self._stream = computed.stream
            self.idle_experts += computed.idle
            yield number, computed.states

    def is_taken_from(self, number: int) -> bool:
        """Returns whether later layers use the keys and values of this one."""
        return number in self._taken_from

    def again(self, number: int, before: Array, original: blocks.States) -> blocks.States:
        """Runs a layer once more, on the original's residual stream.

        Its second half runs on the original's stream after attention. So no block is blamed for the errors of others.
        Shared keys and values come from the earlier layer's own run on the original's stream, if there was one.

        Args:
            number: The layer.
            before: The original's stream before it, float32 (tokens, hidden).
            original: Outputs of the original's blocks in this layer.

        Returns:
            Outputs of the checkpoint's blocks.
        """
        added = original.get(blocks.NORM_AFTER_ATTENTION, original[blocks.ATTENTION])
        kept, middle = self._originals_keys_and_values, jnp.asarray(before + added)
        return self._layer(jnp.asarray(before), number, original, kept, middle).states

    def _layer(
        self,
        stream: jax.Array,
        number: int,
        original: blocks.States | None,
        kept: dict[int, KeysAndValues],
        middle: jax.Array | None = None,
    ) -> _Computed:
        """Runs one layer.

        kept: keys and values that later layers use, by layer. middle: replaces the stream after attention.
        """
        with jax.default_matmul_precision("highest"):
            layer, eps = self._config.layers[number], self._config.eps
            leaves, norms = self._weights.layer(layer), layer.norms
            states: dict[str, jax.Array | Array] = {}

            def norm(x: jax.Array, path: str | None, block: str) -> jax.Array:
                if path is None:
                    return x
                normed: jax.Array = rms_norm(x, leaves.read(path) + self._config.norm_offset, eps)
                states[block] = normed
                return normed

            x = norm(stream, norms.before_attention, blocks.NORM_BEFORE_ATTENTION)
            states[blocks.ATTENTION] = x = self._attention(x, leaves, number, layer, kept, original)
            stream = stream + norm(x, norms.after_attention, blocks.NORM_AFTER_ATTENTION)
            if middle is not None:
                stream = middle
            x = norm(stream, norms.before_mlp, blocks.NORM_BEFORE_MLP)
            half = feed_forward(x, stream, leaves, layer.feed_forward, eps, original=original, tie=self._tie)
            states |= half.states
            stream = stream + norm(half.out, norms.after_mlp, blocks.NORM_AFTER_MLP)
            if self._config.per_layer_input is not None:
                assert self._own_inputs is not None
                own = self._own_inputs[number]
                stream, seen = add_per_layer_input(stream, own, leaves, self._config.per_layer_input, eps)
                states |= seen
            if self._config.layer_scalars:
                stream = stream * leaves.read(LAYER_SCALAR)
            states[blocks.STREAM] = stream
        return _Computed(stream, {name: np.asarray(array) for name, array in states.items()}, half.idle)

    def _attention(
        self,
        x: jax.Array,
        leaves: Leaves,
        number: int,
        layer: Layer,
        kept: dict[int, KeysAndValues],
        original: blocks.States | None,
    ) -> jax.Array:
        """The output of attention, float32 (tokens, hidden); x is the normed residual stream, of the same shape."""
        config, path, eps = layer.attention, layer.attention_path, self._config.eps
        if isinstance(config, Latent):
            chosen = None if original is None else original.get(blocks.INDEXER)
            return latent_attention(x, leaves, path, config, self._sequence, chosen, self._tie)
        if not isinstance(config, GroupedQuery):
            return delta_net(x, leaves, path, config, eps, self._sequence)
        earlier = None
        if config.keys_from is not None:
            earlier = kept.get(config.keys_from, self._keys_and_values[config.keys_from])
        out, own = grouped_query_attention(x, leaves, path, config, eps, self._sequence, earlier)
        if number in self._taken_from:
            kept[number] = own
        return out

    def logits(self, original: Array | None = None) -> list[Array]:
        """Computes the logits, after the last of `layers`.

        Args:
            original: The original's residual stream after the last layer, float32 (tokens, hidden). None: the
                checkpoint's own.

        Returns:
            For each prompt float32 (tokens, vocabulary).
        """
        stream = self._stream if original is None else jnp.asarray(original)
        assert stream is not None
        with jax.default_matmul_precision("highest"):
            logits = unembed(stream, self._weights.top, self._config)
        return np.split(logits, np.cumsum([len(prompt) for prompt in self._prompts])[:-1])

    def run(self) -> list[Array]:
        """Runs all layers and returns the logits: for each prompt float32 (tokens, vocabulary)."""
        for _ in self.layers():
            pass
        return self.logits()


def unembed(stream: jax.Array, top: Leaves, config: ForwardConfig) -> Array:
    """Applies final norm and output projection: float32 (tokens, vocabulary). A tied model uses its embedding."""
    normed = rms_norm(stream, top.read(FINAL_NORM) + config.norm_offset, config.eps)
    if not config.tied:
        return _capped(np.asarray(top.contract(normed, OUTPUT)), config.softcap)
    logits = np.empty((len(stream), config.tokens), np.float32)
    for start, stop in top.slices(EMBEDDING):
        stop = min(stop, config.tokens)
        if start < stop:
            logits[:, start:stop] = (normed / config.embedding_scale) @ top.read(EMBEDDING, (start, stop)).T
    return _capped(logits, config.softcap)


def _capped(logits: Array, softcap: float | None) -> Array:
    return logits if softcap is None else np.asarray(softcap * np.tanh(logits / np.float32(softcap)), np.float32)
