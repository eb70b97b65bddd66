"""Moving bytes between layouts and dtypes at the speed of memory.

numpy's own copy of a transposed array reads down columns, a new cache line for every element; and where rows lie a
power of two apart, as most models' do, the lines of a column fall into the same few sets of the cache and drive each
other out. Tiles that go through a small buffer with rows an odd number of lines apart run five times faster. And
ml_dtypes converts bfloat16 through a slow path that bit shifts avoid.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from conversion_lib.core.dtypes import numpy_dtype
from conversion_lib.core.tensors import Array

CACHE_LINE = 64
TILE_ROWS, TILE_ROW_BYTES = 512, 1024
"""A tile, 544 KiB with its padding, fits the second cache; in smaller ones threads wait for the interpreter's lock.
Its rows become what is written in one run: the longer, the fewer pages of the destination are open at once."""

SMALLEST_SLAB = 4096
"""Elements for which a tile's two calls of numpy cost less than they gain."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def copy_into(destination: Array, source: Array) -> None:
    """Copies `source` into `destination` of the same shape and dtype, whatever the strides of the two."""
    unsigned = _UNSIGNED[destination.itemsize]
    to, of = _joined(destination.view(unsigned).squeeze(), source.view(unsigned).squeeze())
    inner = next((axis for axis, stride in enumerate(of.strides[:-1]) if stride == of.itemsize), None)
    if inner is None or of.strides[-1] == of.itemsize or of.shape[inner] * of.shape[-1] < SMALLEST_SLAB:
        np.copyto(to, of)
        return
    to, of = np.moveaxis(to, inner, -2), np.moveaxis(of, inner, -2)
    for slab in np.ndindex(of.shape[:-2]):
        _transpose_tiles(to[slab], of[slab])


def _joined(to: Array, of: Array) -> tuple[Array, Array]:
    """The two arrays with their last axes made one, as far as each of them steps through those evenly."""
    while to.ndim > 2 and all(a.strides[-2] == a.strides[-1] * a.shape[-1] for a in (to, of)):
        shape = (*to.shape[:-2], to.shape[-2] * to.shape[-1])
        to, of = to.reshape(shape), of.reshape(shape)
    return to, of


def _transpose_tiles(to: Array, of: Array) -> None:
    """Copies between two matrices, `of` in column-major order, through a padded tile."""
    columns = TILE_ROW_BYTES // of.itemsize
    tile = np.empty((TILE_ROWS, columns + CACHE_LINE // of.itemsize), of.dtype)
    for row in range(0, of.shape[0], columns):
        for column in range(0, of.shape[1], TILE_ROWS):
            part = of[row : row + columns, column : column + TILE_ROWS]
            held = tile[: part.shape[1], : part.shape[0]].T
            np.copyto(held, part)
            np.copyto(to[row : row + columns, column : column + TILE_ROWS], held)


def cast(array: Array, dtype: str) -> Array:
    """`array` as `dtype`, rounded to nearest even, infinite where it is too large; itself where it has that dtype."""
    if array.dtype.name == dtype:
        return array
    if array.dtype == ml_dtypes.bfloat16 and dtype == "float32":
        # bfloat16 is the upper half of a float32
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(numpy_dtype(dtype))
