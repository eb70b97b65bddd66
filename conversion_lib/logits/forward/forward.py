"""Logits of a MaxText checkpoint, computed layer by layer from its own files.

One layer's weights are held at a time, in slices, so that memory does not grow with the model. Everything
is float32, products at the highest precision. Nothing here knows the converter's tables: paths and shapes
come from `layout.py`, so that a mistake there is not made twice.
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
    """A layer's stream, what its blocks put out, and how many of its experts no token went to."""

    stream: jax.Array
    states: blocks.States
    idle: int


class ForwardPass:
    """One run of `prompts` (integers, (tokens,) each) through the weights of `checkpoint`: `layers`, then `logits`.

    bias_order: the layout of a scanned DeepSeek-V3 gate bias where it is known. dither: as `Weights` has it.
    tie: as `rounding.tie_share` has it, by default that of the same bits. `idle_experts` counts the (layer, expert)
    pairs that no token went to. `original`: to be set, before each layer, to what the original's blocks put out in it,
    where that is known: equal experts, and tokens that an indexer finds equal, are then chosen as it does.

    Raises BadInput where a leaf is missing, left over, or disagrees with `config`.
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
        """The number of each layer and what its blocks put out, the embedding first."""
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
        """Whether later layers take the keys and values of this one."""
        return number in self._taken_from

    def again(self, number: int, before: Array, original: blocks.States) -> blocks.States:
        """What the blocks of a layer put out where it starts from the original's stream `before` it, float32 (tokens,
        hidden), and its second half from the original's stream behind attention.

        So no block is blamed for what others got wrong. Keys and values of an earlier layer are those of its own run
        from the original's stream, where there was one.
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
        """kept: where keys and values go that later layers take. middle: the stream behind attention, where it is to be
        another than the own."""
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
        """What attention adds to the stream: x is the normed stream, float32 (tokens, hidden), as is the result."""
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
        """After the last of `layers`: for each prompt float32 (tokens, vocabulary). original: the original's stream, to
        take instead of the own."""
        stream = self._stream if original is None else jnp.asarray(original)
        assert stream is not None
        with jax.default_matmul_precision("highest"):
            logits = unembed(stream, self._weights.top, self._config)
        return np.split(logits, np.cumsum([len(prompt) for prompt in self._prompts])[:-1])

    def run(self) -> list[Array]:
        """The logits, where nobody looks at the layers."""
        for _ in self.layers():
            pass
        return self.logits()


def unembed(stream: jax.Array, top: Leaves, config: ForwardConfig) -> Array:
    """Final norm and output projection, float32 (tokens, vocabulary); a tied model uses its embedding."""
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
