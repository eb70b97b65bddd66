"""A MaxText checkpoint in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conversion_lib.core.tensors import StoredSlice, TensorInfo


class MemoryCheckpoint:
    """Leaves in memory, read as those of a checkpoint are."""

    def __init__(self, leaves: Mapping[str, np.ndarray], scan_layers: bool | None = None) -> None:
        self._arrays = {f"params/params/{path}": array for path, array in leaves.items()}
        self.scan_layers = scan_layers
        self.tensors = {n: TensorInfo(n, a.shape, a.dtype.name) for n, a in self._arrays.items()}
        self.reads: list[str] = []

    def read(self, name: str, box: Any = None) -> np.ndarray:
        self.reads.append(name)
        array = self._arrays[name]
        return array if box is None else array[tuple(slice(*span) for span in box)]

    def requires(self, name: str, box: Any = None) -> list[StoredSlice]:
        return [StoredSlice.of(self.tensors[name], box)]
