"""Ops: the small invertible steps between a Hugging Face tensor and a MaxText array.

An op gives the output shape for an input shape, the input box that an output box needs (`pull`), and the output box
made from that input box (`forward`). So a chain of ops applies to any slice of a tensor, which limits the memory of a
conversion. Layout ops return numpy views if possible. Bytes are then moved only in the copy into the destination
(`conversion_lib.core.copying`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from conversion_lib.core.boxes import Box, Shape, slices, whole
from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput
from conversion_lib.plan.value_ops import Resize, Scale, ScaleEmbedding, Shift


class OpLike(Protocol):
    """The methods of an op, which all ops in this module and in `value_ops` have."""

    def shape(self, shape: Shape) -> Shape:
        """Returns the output shape for an input shape.

        Raises:
            BadInput: The op does not fit an input of this shape.
        """
        ...

    def pull(self, box: Box, shape: Shape) -> Box:
        """Returns the smallest input box that is needed for an output box.

        Args:
            box: A box of the output.
            shape: The shape of the whole input.
        """
        ...

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        """Returns the output box, as a view of `block` if possible, in the same dtype.

        Args:
            block: The elements of `pull(box, shape)`.
            box: A box of the output.
            shape: The shape of the whole input.
        """
        ...

    def inverse(self) -> Op:
        """Returns the op that undoes this one."""
        ...

    def exact(self, dtype: str) -> bool:
        """Returns whether `inverse` gives back the bits of an array of this dtype."""
        ...


@dataclass(frozen=True)
class Transpose:
    """(a, b) -> (b, a): a linear layer's weight (out, in) becomes MaxText's kernel (in, out)."""

    op: Literal["transpose"] = "transpose"

    def shape(self, shape: Shape) -> Shape:
        if len(shape) != 2:
            raise BadInput(f"transpose needs two dimensions, not {shape}")
        return shape[::-1]

    def pull(self, box: Box, shape: Shape) -> Box:
        return box[::-1]

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        return block.T

    def inverse(self) -> Op:
        return Transpose()

    def exact(self, dtype: str) -> bool:
        return True


@dataclass(frozen=True)
class Split:
    """Splits `axis` of size n·m into two axes (n, m): the fused heads of a projection into (heads, head_dim)."""

    axis: int
    sizes: tuple[int, int]
    op: Literal["split"] = "split"

    def shape(self, shape: Shape) -> Shape:
        if shape[self.axis] != math.prod(self.sizes):
            raise BadInput(f"axis {self.axis} of {shape} cannot be split into {self.sizes}")
        return (*shape[: self.axis], *self.sizes, *shape[self.axis + 1 :])

    def pull(self, box: Box, shape: Shape) -> Box:
        (n0, n1), (m0, m1) = box[self.axis : self.axis + 2]
        inner = self.sizes[1]
        rows = (n0 * inner + m0, n0 * inner + m1) if n1 - n0 == 1 else (n0 * inner, n1 * inner)
        return (*box[: self.axis], rows, *box[self.axis + 2 :])

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        (n0, n1), (m0, m1) = box[self.axis : self.axis + 2]
        outer, inner = n1 - n0, (m1 - m0 if n1 - n0 == 1 else self.sizes[1])
        view = block.reshape(*block.shape[: self.axis], outer, inner, *block.shape[self.axis + 1 :])
        if inner == m1 - m0:
            return view
        return view[(slice(None),) * (self.axis + 1) + (slice(m0, m1),)]

    def inverse(self) -> Op:
        return Merge(self.axis, self.sizes)

    def exact(self, dtype: str) -> bool:
        return True


@dataclass(frozen=True)
class Merge:
    """Merges two neighbouring axes (n, m), of which `axis` is the first, into one of size n·m: undoes Split."""

    axis: int
    sizes: tuple[int, int]
    op: Literal["merge"] = "merge"

    def shape(self, shape: Shape) -> Shape:
        if tuple(shape[self.axis : self.axis + 2]) != tuple(self.sizes):
            raise BadInput(f"axes {self.axis} and {self.axis + 1} of {shape} should be {self.sizes}")
        return (*shape[: self.axis], math.prod(self.sizes), *shape[self.axis + 2 :])

    def pull(self, box: Box, shape: Shape) -> Box:
        start, stop = box[self.axis]
        inner = self.sizes[1]
        n0, n1 = start // inner, -(-stop // inner)
        cols = (start - n0 * inner, stop - n0 * inner) if n1 - n0 == 1 else (0, inner)
        return (*box[: self.axis], (n0, n1), cols, *box[self.axis + 1 :])

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        start, stop = box[self.axis]
        merged = block.shape[self.axis] * block.shape[self.axis + 1]
        view = block.reshape(*block.shape[: self.axis], merged, *block.shape[self.axis + 2 :])
        if merged == stop - start:
            return view
        first = start - start // self.sizes[1] * self.sizes[1]
        return view[(slice(None),) * self.axis + (slice(first, first + stop - start),)]

    def inverse(self) -> Op:
        return Split(self.axis, self.sizes)

    def exact(self, dtype: str) -> bool:
        return True


@dataclass(frozen=True)
class Interleave:
    """Turns the halves of `axis` into pairs, (x0 x1 … | y0 y1 …) -> (x0 y0 x1 y1 …), or back if `reverse`.

    Hugging Face's Llama rotates the first half of a head against the second; MaxText's Llama rotates neighbours.
    """

    axis: int
    reverse: bool = False
    op: Literal["interleave"] = "interleave"

    def shape(self, shape: Shape) -> Shape:
        if shape[self.axis] % 2:
            raise BadInput(f"axis {self.axis} of {shape} has an odd size")
        return shape

    def pull(self, box: Box, shape: Shape) -> Box:
        return (*box[: self.axis], (0, shape[self.axis]), *box[self.axis + 1 :])

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        full = block.shape[self.axis]
        parts = (full // 2, 2) if self.reverse else (2, full // 2)
        view = block.reshape(*block.shape[: self.axis], *parts, *block.shape[self.axis + 1 :])
        mixed = view.swapaxes(self.axis, self.axis + 1).reshape(block.shape)
        return mixed[(slice(None),) * self.axis + (slice(*box[self.axis]),)]

    def inverse(self) -> Op:
        return Interleave(self.axis, not self.reverse)

    def exact(self, dtype: str) -> bool:
        return True


@dataclass(frozen=True)
class Permute:
    """Reorders axes: axis i of the output is axis `order[i]` of the input."""

    order: tuple[int, ...]
    op: Literal["permute"] = "permute"

    def shape(self, shape: Shape) -> Shape:
        if len(shape) != len(self.order):
            raise BadInput(f"permute needs {len(self.order)} dimensions, not {shape}")
        return tuple(shape[axis] for axis in self.order)

    def pull(self, box: Box, shape: Shape) -> Box:
        return tuple(box[self.order.index(axis)] for axis in range(len(box)))

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        return block.transpose(self.order)

    def inverse(self) -> Op:
        return Permute(tuple(self.order.index(axis) for axis in range(len(self.order))))

    def exact(self, dtype: str) -> bool:
        return True


@dataclass(frozen=True)
class Pick:
    """Takes index `index` of `axis`, which has size `size`, and removes the axis: gate or up of a fused projection.

    The inverse adds the axis again with size 1: the result is one of `size` parts of the whole.
    """

    axis: int
    index: int
    size: int
    op: Literal["pick"] = "pick"

    def shape(self, shape: Shape) -> Shape:
        if shape[self.axis] != self.size:
            raise BadInput(f"axis {self.axis} of {shape} should have size {self.size}")
        return (*shape[: self.axis], *shape[self.axis + 1 :])

    def pull(self, box: Box, shape: Shape) -> Box:
        return (*box[: self.axis], (self.index, self.index + 1), *box[self.axis :])

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        return block.squeeze(self.axis)

    def inverse(self) -> Op:
        return Expand(self.axis)

    def exact(self, dtype: str) -> bool:
        return True


@dataclass(frozen=True)
class Expand:
    """Adds an axis of size 1 at `axis`, for a layer or an expert in a stacked array."""

    axis: int
    op: Literal["expand"] = "expand"

    def shape(self, shape: Shape) -> Shape:
        return (*shape[: self.axis], 1, *shape[self.axis :])

    def pull(self, box: Box, shape: Shape) -> Box:
        return (*box[: self.axis], *box[self.axis + 1 :])

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        return np.expand_dims(block, self.axis)

    def inverse(self) -> Op:
        return Squeeze(self.axis)

    def exact(self, dtype: str) -> bool:
        return True


@dataclass(frozen=True)
class Squeeze:
    """Removes an axis of size 1: undoes Expand."""

    axis: int
    op: Literal["squeeze"] = "squeeze"

    def shape(self, shape: Shape) -> Shape:
        if shape[self.axis] != 1:
            raise BadInput(f"axis {self.axis} of {shape} should have size 1")
        return (*shape[: self.axis], *shape[self.axis + 1 :])

    def pull(self, box: Box, shape: Shape) -> Box:
        return (*box[: self.axis], (0, 1), *box[self.axis :])

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        return block.squeeze(self.axis)

    def inverse(self) -> Op:
        return Expand(self.axis)

    def exact(self, dtype: str) -> bool:
        return True


Op = Annotated[
    Transpose
    | Split
    | Merge
    | Interleave
    | Permute
    | Pick
    | Expand
    | Squeeze
    | Scale
    | ScaleEmbedding
    | Shift
    | Resize,
    Field(discriminator="op"),
]
Ops = tuple[Op, ...]


def chain_shape(ops: Sequence[Op], shape: Shape) -> Shape:
    """Returns the output shape of a chain for an input shape.

    Raises:
        BadInput: An op does not fit.
    """
    for op in ops:
        shape = op.shape(shape)
    return shape


def inverse_chain(ops: Sequence[Op]) -> Ops:
    """Returns the chain that undoes `ops`."""
    return tuple(op.inverse() for op in reversed(ops))


def pull_chain(ops: Sequence[Op], box: Box, shape: Shape) -> Box:
    """Returns the input box, in an input of `shape`, that the output box `box` needs."""
    for op, before in zip(reversed(ops), _shapes_before(ops, shape)[::-1], strict=True):
        box = op.pull(box, before)
    return box


def forward_chain(ops: Sequence[Op], block: Array, box: Box, shape: Shape) -> Array:
    """Returns the output box `box`, made from `block`, the elements of `pull_chain(ops, box, shape)`."""
    shapes = _shapes_before(ops, shape)
    boxes = [box]
    for op, before in zip(reversed(ops), reversed(shapes), strict=True):
        boxes.append(op.pull(boxes[-1], before))
    for op, before, wanted in zip(ops, shapes, boxes[-2::-1], strict=True):
        block = op.forward(block, wanted, before)
    return block


def apply(ops: Sequence[Op], array: Array) -> Array:
    """Applies a chain to a whole array."""
    everything = whole(chain_shape(ops, array.shape))
    needed = array[slices(pull_chain(ops, everything, array.shape))]
    return forward_chain(ops, needed, everything, array.shape)


def _shapes_before(ops: Sequence[Op], shape: Shape) -> list[Shape]:
    """Returns the input shape of each op of a chain."""
    shapes = []
    for op in ops:
        shapes.append(shape)
        shape = op.shape(shape)
    return shapes
