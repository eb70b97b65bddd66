"""Weights of a MaxText checkpoint, read in slices, one layer at a time. All shapes are checked first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.core.boxes import Box, Shape, whole
from conversion_lib.core.dtypes import FLOATS
from conversion_lib.core.tensors import Array, Source
from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.config import ForwardConfig, Layer, Moe
from conversion_lib.logits.forward.layout import gate_bias, layer_leaves, top_leaves
from conversion_lib.logits.forward.memory import Memory
from conversion_lib.logits.verdict.rounding import Dither
from conversion_lib.progress import Task

ROOT = "params/params/"

BiasOrder = Literal["layers_first", "experts_first"]
"""Layout of a scanned DeepSeek-V3 gate bias: (layers, experts) or (experts, layers)."""


class Checkpoint(Source, Protocol):
    """A MaxText checkpoint as a source (`conversion_lib.sources.orbax.OrbaxSource`)."""

    @property
    def scan_layers(self) -> bool | None: ...


class Leaves:
    """Leaves under one path: those of a layer, or those outside the layers.

    Args:
        weights: The checkpoint they are read from.
        prefix: Path in front of each leaf, with a slash at its end.
        shapes: Shape of each leaf, unstacked, by path below `prefix`.
        index: The layer's index in the stacked axes; empty where nothing is stacked.
        counts: Lengths of the stacked axes.
        layers_first: The leaf that is stacked on axis 0 instead of 1. None: there is none.
    """

    def __init__(
        self,
        weights: Weights,
        prefix: str,
        shapes: dict[str, Shape],
        index: tuple[int, ...] = (),
        counts: tuple[int, ...] = (),
        layers_first: str | None = None,
    ) -> None:
        self._weights, self._prefix, self.shapes = weights, prefix, shapes
        self._index, self._counts, self._layers_first = index, counts, layers_first

    def stored(self, leaf: str) -> tuple[str, Shape]:
        """Returns the full path of a leaf and the shape that it must have in the checkpoint, stacked axes included."""
        shape, axis = self.shapes[leaf], self._axis(leaf)
        return f"{ROOT}{self._prefix}{leaf}", (*shape[:axis], *self._counts, *shape[axis:])

    def _axis(self, leaf: str) -> int:
        return 0 if leaf == self._layers_first else 1

    def read(self, leaf: str, rows: tuple[int, int] | None = None) -> jax.Array:
        """Reads a leaf as float32 in its unstacked shape. `rows`: (start, stop) of its first axis; None: all of it."""
        name, shape = f"{ROOT}{self._prefix}{leaf}", self.shapes[leaf]
        box: Box = whole(shape) if rows is None else (rows, *whole(shape[1:]))
        axis, here = self._axis(leaf), tuple((index, index + 1) for index in self._index)
        stacked = self._weights.read(name, (*box[:axis], *here, *box[axis:]))
        return jnp.squeeze(stacked, tuple(range(axis, axis + len(here))))

    def slices(self, leaf: str, together: int = 1) -> Iterator[tuple[int, int]]:
        """Cuts the leaf's first axis into ranges that fit `memory.slice_bytes` as float32.

        Args:
            leaf: Path of the leaf.
            together: How many leaves of about this size are held at once.

        Yields:
            (start, stop). A range has at least one row, whatever its size.
        """
        shape = self.shapes[leaf]
        rows = max(1, self._weights.memory.slice_bytes // (4 * together * math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            yield start, min(start + rows, shape[0])

    def contract(self, x: jax.Array, leaf: str, axes: int = 1) -> jax.Array:
        """Multiplies x by the leaf, summed over the last `axes` axes of x and the first ones of the leaf.

        The leaf is read in slices along its first axis, the one that checkpoints are chunked along, so that no chunk is
        read twice. A slice is read while jax multiplies by the previous one. Without waiting for that product, all
        slices would be read at once.

        Args:
            x: float32 (tokens, ...).
            leaf: Path of the leaf.
            axes: Axes to sum over.

        Returns:
            float32 (tokens, remaining axes of the leaf).
        """
        total: jax.Array | None = None
        for start, stop in self.slices(leaf):
            rows = self.read(leaf, (start, stop))
            part = jnp.tensordot(jax.block_until_ready(x)[:, start:stop], rows, axes)
            total = part if total is None else jax.block_until_ready(total) + part
        assert total is not None
        return total


def embed(tokens: Array, top: Leaves, leaf: str) -> jax.Array:
    """Looks up token ids, int (tokens,), in an embedding, which is read in slices: float32 (tokens, width)."""
    stream = np.zeros((len(tokens), top.shapes[leaf][1]), np.float32)
    for start, stop in top.slices(leaf):
        here = (tokens >= start) & (tokens < stop)
        if here.any():
            stream[here] = np.asarray(top.read(leaf, (start, stop)))[tokens[here] - start]
    return jnp.asarray(stream)


class Weights:
    """All weights of a checkpoint.

    Args:
        source: The checkpoint; the caller keeps it open.
        config: The model.
        bias_order: Layout of a scanned DeepSeek-V3 gate bias. None: its shape tells.
        memory: How many bytes to hold at a time.
        dither: Noise to add to the values. None: they stay as they are.
        task: Advanced by the bytes read.

    Attributes:
        top: Leaves outside the layers.
        memory: How many bytes are held at a time.

    Raises:
        BadInput: A leaf is missing, does not have the shape that `config` requires, has no float dtype, or has no
            place in this architecture: a weight that nothing reads would stay unchecked. The message names the leaf.
    """

    def __init__(
        self,
        source: Checkpoint,
        config: ForwardConfig,
        *,
        bias_order: BiasOrder | None = None,
        memory: Memory | None = None,
        dither: Dither | None = None,
        task: Task | None = None,
    ) -> None:
        self._source, self._config, self._order, self._task = source, config, bias_order, task
        self._dither, self._random = dither, np.random.default_rng(0)
        self.memory = memory or Memory()
        self._scanned = self._is_scanned()
        self.top = Leaves(self, "", top_leaves(config))
        self._check()

    def _is_scanned(self) -> bool:
        if self._source.scan_layers is not None:
            return self._source.scan_layers
        stacks = tuple({f"{ROOT}decoder/{layer.path.stack}/" for layer in self._config.layers})
        return any(name.startswith(stacks) for name in self._source.tensors)

    def layer(self, layer: Layer) -> Leaves:
        """Returns the leaves of one decoder layer. Nothing is read yet."""
        path, shapes = layer.path, layer_leaves(layer, self._config)
        if not self._scanned:
            return Leaves(self, f"decoder/{path.alone}/", shapes)
        prefix = f"decoder/{path.stack}/"
        first = self._layers_first(prefix, layer.feed_forward, path.counts)
        return Leaves(self, prefix, shapes, path.index, path.counts, first)

    def _layers_first(self, prefix: str, moe: object, counts: tuple[int, ...]) -> str | None:
        """The gate bias of a scanned DeepSeek-V3 if it is (layers, experts), not (experts, layers)."""
        if not isinstance(moe, Moe) or not moe.correction_bias:
            return None
        leaf, order, layers = gate_bias(moe), self._order, math.prod(counts)
        info = self._source.tensors.get(f"{ROOT}{prefix}{leaf}")
        if order is None and info is not None and info.shape == (moe.experts, layers):
            if moe.experts == layers:
                raise BadInput(
                    f"{info.name} is ({layers}, {layers}): the shape does not tell whether layers or experts come "
                    "first, and the checkpoint has no ferry.json that names its MaxText version"
                )
            order = "experts_first"
        return None if order == "experts_first" else leaf

    def read(self, name: str, box: Box) -> jax.Array:
        """Reads the elements of `box` as float32, with dither if there is any."""
        array = self._source.read(name, box)
        if self._task is not None:
            self._task.advance(array.nbytes)
        values = jnp.asarray(array).astype(jnp.float32)  # jax casts faster than numpy
        if self._dither is None or name not in self._dither.leaves:
            return values
        return values + jnp.asarray(self._noise(array, self._dither.bits))

    def _noise(self, array: Array, bits: int) -> Array:
        """Half a unit in the last place of `bits` significant bits, with a random sign: the most that rounding can do.

        A zero stays zero, since no other value is rounded to it.
        """
        powers = np.ascontiguousarray(array, np.float32).view(np.uint32) & np.uint32(0x7F800000)
        half_units = powers.view(np.float32) * np.float32(2.0**-bits)
        signs = self._random.integers(0, 2, array.shape, np.uint32) << np.uint32(31)
        noise: Array = (half_units.view(np.uint32) | signs).view(np.float32)
        return noise

    def _check(self) -> None:
        expected = dict(self.top.stored(leaf) for leaf in self.top.shapes)
        for layer in self._config.layers:
            leaves = self.layer(layer)
            expected |= dict(leaves.stored(leaf) for leaf in leaves.shapes)
        tensors = self._source.tensors
        for name, shape in expected.items():
            info = tensors.get(name)
            if info is None:
                raise BadInput(f"the checkpoint has no leaf {name}, which config.json requires")
            if info.shape != shape:
                raise BadInput(f"leaf {name} has shape {info.shape}, but config.json requires {shape}")
            if info.dtype not in FLOATS:
                raise BadInput(f"leaf {name} has dtype {info.dtype}, expected one of {', '.join(sorted(FLOATS))}")
        for name in tensors:
            if name.startswith("params/") and name not in expected:
                raise BadInput(
                    f"leaf {name} has no place in the model of config.json: it would stay unread and unchecked"
                )
