"""Names of dtypes: numpy's (with ml_dtypes) and those of safetensors headers."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

from conversion_lib.errors import BadInput

SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
"""safetensors' spelling -> numpy's (https://huggingface.co/docs/safetensors, "Format")."""

SAFETENSORS_NAMES = {name: code for code, name in SAFETENSORS_DTYPES.items()}

FLOATS = frozenset({"bfloat16", "float16", "float32", "float64"})


@cache
def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype of this name: bfloat16 and float8 kinds from ml_dtypes, all others from numpy.

    Raises:
        BadInput: Neither has such a dtype.
    """
    try:
        return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)
    except TypeError:
        raise BadInput(f"no such dtype: {name}") from None


@cache
def itemsize(name: str) -> int:
    """Returns the bytes of one element.

    Raises:
        BadInput: There is no such dtype.
    """
    return numpy_dtype(name).itemsize
