"""A MaxText checkpoint as a source: arrays in Orbax's layout, read with TensorStore.

Layout: `<DST>/0/items/_METADATA` names the leaves of the tree; each array is a zarr (2 or 3) array, either in
one OCDBT store at `items/` under the leaf's dotted name or in a directory of that name (Orbax's
`PyTreeCheckpointHandler`). Nothing of jax or orbax is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from conversion_lib.boxes import Box, size, slices
from conversion_lib.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.sources.base import Array, TensorInfo

METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"


def items_dir(checkpoint: str | Path) -> Path:
    """The `items` directory of DST, DST/0 or DST/0/items. Raises BadInput where there is none."""
    path = Path(checkpoint).absolute()
    for candidate in (path, path / "items", path / "0" / "items"):
        if (candidate / METADATA).is_file():
            return candidate
    raise BadInput(f"{checkpoint} holds no Orbax checkpoint: no {METADATA} in it, in items/ or in 0/items/")


def directory_spec(directory: Path) -> dict[str, Any]:
    """TensorStore's spec for a directory: a path, since a `file://` URL would read `%`, `#` and `?` as its own."""
    return {"driver": "file", "path": f"{directory}/"}


def array_spec(items: Path, name: str, *, ocdbt: bool, zarr3: bool) -> dict[str, Any]:
    """TensorStore's spec for the leaf with the dotted `name`."""
    if ocdbt:
        kvstore = {"driver": "ocdbt", "base": directory_spec(items), "path": f"{name}/"}
    else:
        kvstore = directory_spec(items / name)
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}


class OrbaxSource:
    """The leaves of one checkpoint, by path such as `params/params/decoder/decoder_norm/scale`."""

    def __init__(self, checkpoint: str | Path) -> None:
        self.items = items_dir(checkpoint)
        self.metadata = _read_json(self.items / METADATA)
        step_file = self.items.parent / STEP_METADATA
        self.step_metadata: dict[str, Any] = _read_json(step_file) if step_file.exists() else {}
        self.ocdbt = bool(self.metadata.get("use_ocdbt", (self.items / "manifest.ocdbt").exists()))
        self.zarr3 = bool(self.metadata.get("use_zarr3", False))
        self._arrays = self._open()
        self.tensors: Mapping[str, TensorInfo] = {
            path: TensorInfo(path, tuple(array.shape), array.dtype.name, str(self.items))
            for path, array in self._arrays.items()
        }

    @property
    def scan_layers(self) -> bool | None:
        """MaxText's own note of how the layers are stored, None where it left none."""
        value = (self.step_metadata.get("custom_metadata") or {}).get("scan_layers")
        return None if value is None else bool(value)

    def _open(self) -> dict[str, Any]:
        # decoded chunks are not kept: every chunk is read once
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        futures = {}
        for entry in self.metadata["tree_metadata"].values():
            keys = [str(part["key"]) for part in entry["key_metadata"]]
            if entry["value_metadata"].get("skip_deserialize") or entry["value_metadata"]["value_type"] == "None":
                continue
            spec = array_spec(self.items, ".".join(keys), ocdbt=self.ocdbt, zarr3=self.zarr3)
            futures["/".join(keys)] = ts.open(spec, open=True, read=True, context=context)
        arrays = {}
        for path, future in futures.items():
            try:
                arrays[path] = future.result()
            except ValueError as error:
                raise BadInput(
                    f"{self.items}: leaf {path} is named in {METADATA} but cannot be opened: {error}"
                ) from error
        return arrays

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].chunk_layout.write_chunk.shape or ())  # a scalar has None

    def read(self, name: str, box: Box | None = None) -> Array:
        array = self._arrays.get(name)
        if array is None:
            raise BadInput(f"{self.items} has no leaf {name}")
        view = array if box is None else array[slices(box)]
        try:
            return np.asarray(view.read().result())
        except ValueError as error:
            raise BadInput(f"{self.items}: leaf {name} cannot be read: {error}") from error

    def stored_bytes(self, name: str, box: Box) -> int:
        return size(box) * itemsize(self.tensors[name].dtype)


def open_orbax(checkpoint: str | Path) -> OrbaxSource:
    """Opens DST, DST/0 or DST/0/items. Raises BadInput where it is no Orbax checkpoint."""
    return OrbaxSource(checkpoint)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} should hold a JSON object")
    return value
