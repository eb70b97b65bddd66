"""Moving bytes between layouts and dtypes at the speed of memory.

numpy's own copy of a transposed array touches a new cache line for every element and runs nine times slower than
a copy in bands; and ml_dtypes converts bfloat16 through a slow path that bit shifts avoid.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from conversion_lib.dtypes import numpy_dtype
from conversion_lib.sources.base import Array

BAND = 32
"""Elements of a band: 32 of bfloat16 fill a cache line; twice as many run at half the speed."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def copy_into(destination: Array, source: Array) -> None:
    """Copies `source` into `destination` of the same shape and dtype, whatever the strides of the two."""
    unsigned = _UNSIGNED[destination.itemsize]
    to, of = destination.view(unsigned), source.view(unsigned)
    last = to.shape[-1] if to.ndim else 0
    if of.ndim < 2 or of.strides[-1] == of.itemsize or last <= BAND:
        np.copyto(to, of)
        return
    for start in range(0, last, BAND):
        np.copyto(to[..., start : start + BAND], of[..., start : start + BAND])


def cast(array: Array, dtype: str) -> Array:
    """`array` as `dtype`, rounded to nearest even; itself where it has that dtype already."""
    if array.dtype.name == dtype:
        return array
    if array.dtype == ml_dtypes.bfloat16 and dtype == "float32":
        # bfloat16 is the upper half of a float32
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(numpy_dtype(dtype))
