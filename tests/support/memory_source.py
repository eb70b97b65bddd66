"""A source over arrays in memory, and boxes to read of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from conversion_lib.core.boxes import Box, slices
from conversion_lib.core.tensors import StoredSlice, TensorInfo

Array = np.ndarray[Any, Any]


class MemorySource:
    """`arrays` by name, all in a file named `shard`."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self.arrays = arrays
        self.tensors = {name: TensorInfo(name, a.shape, a.dtype.name, "shard") for name, a in arrays.items()}

    def read(self, name: str, box: Box | None = None) -> Array:
        array = self.arrays[name]
        return np.ascontiguousarray(array if box is None else array[slices(box)]).reshape(
            array.shape if box is None else tuple(stop - start for start, stop in box)
        )

    def requires(self, name: str, box: Box | None = None) -> list[StoredSlice]:
        return [StoredSlice.of(self.tensors[name], box)]


def boxes_in(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    """Boxes of a shape, none of them empty."""
    sides = [
        st.lists(st.integers(0, extent), min_size=2, max_size=2, unique=True).map(lambda ends: tuple(sorted(ends)))
        for extent in shape
    ]
    return st.tuples(*sides)


def bits(array: Array) -> Array:
    """The bits of a bfloat16 array: equal where the values are, NaN and the sign of zero included."""
    assert array.dtype.name == "bfloat16"
    return np.ascontiguousarray(array).view(np.uint16)
