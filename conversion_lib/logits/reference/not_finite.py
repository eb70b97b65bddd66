"""Which tensor of the original has a NaN or an infinity, where its own values are no longer finite."""

from __future__ import annotations

import re

import numpy as np

from conversion_lib.core.boxes import whole
from conversion_lib.core.copying import cast
from conversion_lib.core.dtypes import FLOATS, itemsize
from conversion_lib.core.tensors import Source, TensorInfo

SLICE_BYTES = 64 << 20


def not_finite_tensor(source: Source, layer: int | None) -> str | None:
    """What is wrong with the first such tensor, by name and file; None where every value is finite.

    Args:
        source: The original's weights.
        layer: Where to look first: a decoder layer's number, another number for what is outside the layers, None for
            no place in particular.
    """
    infos = sorted(source.tensors.values(), key=lambda info: _layer_of(info.name) != layer)
    found = (_wrong(source, info) for info in infos if info.dtype in FLOATS)
    return next((said for said in found if said is not None), None)


def _layer_of(name: str) -> int:
    match = re.search(r"\blayers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _wrong(source: Source, info: TensorInfo) -> str | None:
    rows = info.shape[0] if info.shape else 1
    step = max(1, SLICE_BYTES * rows // max(1, info.nbytes // itemsize(info.dtype) * 4))
    for start in range(0, rows, step):
        box = ((start, min(start + step, rows)), *whole(info.shape[1:])) if info.shape else None
        values = cast(source.read(info.name, box), "float32")
        if not np.isfinite(values).all():
            kind = "a NaN" if np.isnan(values).any() else "an infinity"
            return f"tensor {info.name} in {info.file} has {kind}"
    return None
