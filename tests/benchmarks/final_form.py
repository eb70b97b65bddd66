"""What the floor writes: the metadata of the arrays of a converted checkpoint, and some of their real chunks.

The floor's time holds the codec's work, which depends on what it encodes; so it encodes chunks of the true result.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from conversion_lib.core.boxes import Box, slices
from conversion_lib.sinks.ocdbt import CONFIG
from conversion_lib.sources.orbax import array_spec, open_orbax
from conversion_lib.storage.local import LocalLocation

SAMPLES = 4
"""Chunks kept of each array, spread over it: more than a processor's cache holds, so that they come from memory."""


class FinalForm:
    """The arrays of one checkpoint: their metadata, and sampled chunks as files in `directory`."""

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        directory.mkdir(parents=True)
        source = open_orbax(checkpoint)
        self._driver, self._ocdbt = "zarr3" if source.zarr3 else "zarr", source.ocdbt
        self._arrays: list[tuple[str, dict[str, Any], str]] = []
        for number, path in enumerate(sorted(path for path in source.tensors if path != "step")):
            name = path.replace("/", ".")
            spec = array_spec(LocalLocation(source.items), name, ocdbt=source.ocdbt, zarr3=source.zarr3)
            array = ts.open(spec, read=True).result()
            file = directory / f"{number}.npy"
            unsigned = np.dtype(f"u{array.dtype.numpy_dtype.itemsize}")
            np.save(file, np.stack([array[slices(box)].read().result().view(unsigned) for box in _sampled(array)]))
            self._arrays.append((name, array.spec().to_json()["metadata"], str(file)))

    def arrays(self, build: Path) -> list[dict[str, Any]]:
        """For floor.py: the arrays' specs in a new checkpoint at `build`, stored as Ferry stores them."""
        return [
            {
                "samples": file,
                "spec": {
                    "driver": self._driver,
                    "kvstore": self._kvstore(build, name),
                    "metadata": metadata,
                    "store_data_equal_to_fill_value": True,
                },
            }
            for name, metadata, file in self._arrays
        ]

    def _kvstore(self, build: Path, name: str) -> dict[str, Any]:
        if not self._ocdbt:
            return LocalLocation(build / name).spec
        return {"driver": "ocdbt", "base": LocalLocation(build).spec, "path": f"{name}/", "config": CONFIG}


def _sampled(array: Any) -> list[Box]:
    """Some of the chunks that lie wholly in the array, evenly spread; the first always does."""
    steps = array.chunk_layout.write_chunk.shape
    spans = [range(0, extent - step + 1, step) for extent, step in zip(array.shape, steps, strict=True)]
    corners = list(itertools.product(*spans))
    chosen = corners[:: max(1, len(corners) // SAMPLES)][:SAMPLES]
    return [tuple((start, start + step) for start, step in zip(corner, steps, strict=True)) for corner in chosen]
