"""Weights of one layer at a time, in slices, out of a MaxText checkpoint, each shape checked first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from conversion_lib.boxes import Box, Shape, whole
from conversion_lib.dtypes import FLOATS
from conversion_lib.errors import BadInput
from conversion_lib.logits.config import ForwardConfig
from conversion_lib.logits.layout import GATE_BIAS, layer_leaves, layer_path, top_leaves
from conversion_lib.progress import Task
from conversion_lib.sources.base import Source

ROOT = "params/params/"
SLICE_BYTES = 256 << 20
"""Weights held as float32 at a time; a larger leaf is read in slices of its first axis."""

BiasOrder = Literal["layers_first", "experts_first"]


class Checkpoint(Source, Protocol):
    """A MaxText checkpoint as a source (`conversion_lib.sources.orbax.OrbaxSource`)."""

    @property
    def scan_layers(self) -> bool | None: ...


class Leaves:
    """Leaves under one path: those of a layer, or those outside the layers."""

    def __init__(self, weights: Weights, prefix: str, shapes: dict[str, Shape], place: tuple[int, int] | None) -> None:
        self._weights, self._prefix, self.shapes, self._place = weights, prefix, shapes, place

    def stored(self, leaf: str) -> tuple[str, Shape]:
        """The full path of a leaf and the shape that it must have in the checkpoint."""
        name, shape = f"{ROOT}{self._prefix}{leaf}", self.shapes[leaf]
        if self._place is None:
            return name, shape
        count = self._place[1]
        if leaf == GATE_BIAS and self._weights.layers_first(name, count, shape[0]):
            return name, (count, *shape)
        return name, (shape[0], count, *shape[1:])

    def read(self, leaf: str, rows: tuple[int, int] | None = None) -> jax.Array:
        """The leaf in the shape of one layer, float32; `rows` is a range of its first axis."""
        name, _ = self.stored(leaf)
        shape = self.shapes[leaf]
        box: Box = whole(shape) if rows is None else (rows, *whole(shape[1:]))
        if self._place is None:
            return self._weights.read(name, box)
        layer = (self._place[0], self._place[0] + 1)
        bias_by_layer = leaf == GATE_BIAS and self._weights.layers_first(name, self._place[1], shape[0])
        axis = 0 if bias_by_layer else 1
        return jnp.squeeze(self._weights.read(name, (*box[:axis], layer, *box[axis:])), axis)

    def slices(self, leaf: str) -> Iterator[tuple[int, int]]:
        """Ranges of the leaf's first axis of at most SLICE_BYTES each."""
        shape = self.shapes[leaf]
        rows = max(1, SLICE_BYTES // (4 * math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            yield start, min(start + rows, shape[0])

    def contract(self, x: jax.Array, leaf: str, axes: int = 1) -> jax.Array:
        """x times the leaf, summed over the last `axes` axes of x and the first of the leaf, slice by slice.

        x: float32 (tokens, ...); the result is float32 (tokens, remaining axes of the leaf). Slices are cut
        along the summed axis because that is the one checkpoints are chunked along: no chunk is read twice.
        """
        total: jax.Array | None = None
        for start, stop in self.slices(leaf):
            part = jnp.tensordot(x[:, start:stop], self.read(leaf, (start, stop)), axes)
            total = part if total is None else total + part
        assert total is not None
        return total


class Weights:
    """All weights of a checkpoint.

    bias_order: how a scanned DeepSeek-V3 gate bias is laid out, where something tells; None lets its shape
    decide. Raises BadInput naming the leaf where one is missing, has another shape than `config` says, is
    not of a float dtype, or is of no use to this architecture (a weight that nothing reads is not checked).
    """

    def __init__(
        self, source: Checkpoint, config: ForwardConfig, bias_order: BiasOrder | None = None, task: Task | None = None
    ) -> None:
        self._source, self._config, self._order, self._task = source, config, bias_order, task
        self._scanned = self._is_scanned()
        self.top = Leaves(self, "", top_leaves(config), None)
        self._check()

    def _is_scanned(self) -> bool:
        if self._source.scan_layers is not None:
            return self._source.scan_layers
        stacks = tuple(f"{ROOT}decoder/{stack}/" for stack in ("layers", "dense_layers", "moe_layers"))
        return any(name.startswith(stacks) for name in self._source.tensors)

    def layer(self, layer: int) -> Leaves:
        """The leaves of decoder layer `layer`, counted from 0 over the whole model."""
        stack, index, count = layer_path(self._config, layer)
        shapes = layer_leaves(self._config, layer)
        if self._scanned:
            return Leaves(self, f"decoder/{stack}/", shapes, (index, count))
        return Leaves(self, f"decoder/{stack}_{index}/", shapes, None)

    def read(self, name: str, box: Box) -> jax.Array:
        """Elements of `box` as float32; cast after the transfer, where it is fastest."""
        array = self._source.read(name, box)
        if self._task is not None:
            self._task.advance(array.nbytes)
        return jnp.asarray(array).astype(jnp.float32)

    def layers_first(self, name: str, layers: int, experts: int) -> bool:
        """Whether the scanned gate bias `name` is (layers, experts) rather than (experts, layers)."""
        if self._order is not None:
            return self._order == "layers_first"
        info = self._source.tensors.get(name)
        if info is None or info.shape != (experts, layers):
            return True
        if experts == layers:
            raise BadInput(
                f"{name} is ({experts}, {layers}): nothing tells whether layers or experts come first, and the "
                "checkpoint has no ferry.json that names the MaxText it is for"
            )
        return False

    def _check(self) -> None:
        expected = dict(self.top.stored(leaf) for leaf in self.top.shapes)
        for layer in range(self._config.layers):
            leaves = self.layer(layer)
            expected |= dict(leaves.stored(leaf) for leaf in leaves.shapes)
        tensors = self._source.tensors
        for name, shape in expected.items():
            info = tensors.get(name)
            if info is None:
                raise BadInput(f"the checkpoint has no leaf {name}, which config.json asks for")
            if info.shape != shape:
                raise BadInput(f"leaf {name} is {info.shape}, and config.json asks for {shape}")
            if info.dtype not in FLOATS:
                raise BadInput(f"leaf {name} has dtype {info.dtype}, which is not one of {', '.join(sorted(FLOATS))}")
        for name in tensors:
            if name.startswith("params/") and name not in expected:
                raise BadInput(f"leaf {name} has no place in the model of config.json; unread, it would be unchecked")
