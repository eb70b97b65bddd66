"""Ops that change values: they scale, shift, or add and remove rows. For the methods see `OpLike` in `plan.ops`.

All except Resize compute in float32 and round once to the array's dtype, as MaxText does.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from conversion_lib.core.boxes import Box, Shape, box_shape
from conversion_lib.core.copying import cast
from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput


@dataclass(frozen=True)
class Scale:
    """Multiplies by 1/sqrt(`root`), or by sqrt(`root`) if `reverse`.

    MaxText stores Llama's query divided by sqrt(head_dim), and rounds in this order. Exact in every dtype if sqrt(root)
    is a power of two, otherwise in none.
    """

    root: int
    reverse: bool = False
    op: Literal["scale"] = "scale"

    def shape(self, shape: Shape) -> Shape:
        return shape

    def pull(self, box: Box, shape: Shape) -> Box:
        return box

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        root = np.sqrt(self.root)
        factor = np.float32(root if self.reverse else 1 / root)
        return cast(cast(block, "float32") * factor, block.dtype.name)

    def inverse(self) -> Scale:
        return Scale(self.root, not self.reverse)

    def exact(self, dtype: str) -> bool:
        return _is_power_of_four(self.root)


@dataclass(frozen=True)
class ScaleEmbedding:
    """Multiplies by sqrt(`hidden`), rounded to `factor_dtype`, or divides by it if `reverse`.

    For Gemma's embedding: transformers scales the rows that it looks up, MaxText stores a scaled table. Gemma 3 first
    rounds the factor to bfloat16.
    """

    hidden: int
    factor_dtype: Literal["float32", "bfloat16"] = "float32"
    reverse: bool = False
    op: Literal["scale_embedding"] = "scale_embedding"

    def shape(self, shape: Shape) -> Shape:
        return shape

    def pull(self, box: Box, shape: Shape) -> Box:
        return box

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        factor = cast(cast(np.array(self.hidden**0.5, np.float32), self.factor_dtype), "float32")
        values = cast(block, "float32")
        return cast(values / factor if self.reverse else values * factor, block.dtype.name)

    def inverse(self) -> ScaleEmbedding:
        return ScaleEmbedding(self.hidden, self.factor_dtype, not self.reverse)

    def exact(self, dtype: str) -> bool:
        return _is_power_of_four(self.hidden)


@dataclass(frozen=True)
class Shift:
    """Adds `by`: Gemma's norms multiply by 1 + weight in transformers, and by the stored scale in MaxText."""

    by: Literal[1, -1] = 1
    op: Literal["shift"] = "shift"

    def shape(self, shape: Shape) -> Shape:
        return shape

    def pull(self, box: Box, shape: Shape) -> Box:
        return box

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        return cast(cast(block, "float32") + np.float32(self.by), block.dtype.name)

    def inverse(self) -> Shift:
        return Shift(-1 if self.by == 1 else 1)

    def exact(self, dtype: str) -> bool:
        return False


@dataclass(frozen=True)
class Resize:
    """Changes the size of `axis` from `before` to `after`: zeros are added at the end, or the end is cut off.

    For some models, MaxText's vocabulary has another size than the published checkpoint's.
    """

    axis: int
    before: int
    after: int
    op: Literal["resize"] = "resize"

    def shape(self, shape: Shape) -> Shape:
        if shape[self.axis] != self.before:
            raise BadInput(f"axis {self.axis} of {shape} should have size {self.before}")
        return (*shape[: self.axis], self.after, *shape[self.axis + 1 :])

    def pull(self, box: Box, shape: Shape) -> Box:
        start, stop = box[self.axis]
        # a box of zeros alone still reads one row, since boxes cannot be empty
        rows = (min(start, self.before - 1), min(stop, self.before))
        return (*box[: self.axis], rows, *box[self.axis + 1 :])

    def forward(self, block: Array, box: Box, shape: Shape) -> Array:
        start, stop = box[self.axis]
        if stop <= self.before:
            return block
        result = np.zeros(box_shape(box), block.dtype)
        if start < self.before:
            result[(slice(None),) * self.axis + (slice(0, self.before - start),)] = block
        return result

    def inverse(self) -> Resize:
        return Resize(self.axis, self.after, self.before)

    def exact(self, dtype: str) -> bool:
        return self.after >= self.before


def _is_power_of_four(number: int) -> bool:
    """Returns whether the root is a power of two, so that the factor changes only exponents."""
    root = math.isqrt(number)
    return root * root == number and root & (root - 1) == 0
