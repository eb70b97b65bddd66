"""A MaxText checkpoint as a source: arrays in Orbax's layout, read with TensorStore.

Layout: `<DST>/0/items/_METADATA` names the leaves of the tree; each array is a zarr (2 or 3) array, either in
one OCDBT store at `items/` under the leaf's dotted name or in a directory of that name (Orbax's
`PyTreeCheckpointHandler`). Nothing of jax or orbax is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from conversion_lib.core.boxes import Box, slices
from conversion_lib.core.tensors import Array, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput, FerryError, OutsideFailure, tensorstore_reason
from conversion_lib.record import CheckpointRecord, record_in
from conversion_lib.storage import gcs as cloud_place
from conversion_lib.storage.interface import Location
from conversion_lib.storage.locations import location

METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
MANIFEST = "manifest.ocdbt"

PARTS = ("", "items", "0/items")
"""From what may be given as a checkpoint to its `items`."""

LASTING = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "PERMISSION_DENIED")
"""How TensorStore begins what it says of a bucket where another try would be of no use."""

Where = str | Path | Location
"""Of a checkpoint: a path, gs://bucket/prefix, or the location that either names."""

Keys = tuple[str, ...]
"""A leaf's place in the tree; an index of a list is its decimal digits."""


def checkpoint_at(checkpoint: Where) -> Location:
    """The location of DST, DST/0 or DST/0/items, as it is given. Raises BadInput for another URL scheme than gs://."""
    return (location(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint).absolute()


def root_of(checkpoint: Where) -> Location:
    """DST, for any of DST, DST/0 and DST/0/items."""
    root = checkpoint_at(checkpoint)
    for last in ("items", "0"):
        if str(root).endswith(f"/{last}"):
            root = root.parent
    return root


def record_of(checkpoint: Where) -> CheckpointRecord | None:
    """The record of the checkpoint at DST, DST/0 or DST/0/items, None where there is none.

    Raises BadInput as `record_in` does.
    """
    root = root_of(checkpoint)
    return record_in(lambda name: (root / name).read(), str(root))


def items_of(checkpoint: Where) -> Location:
    """The `items` of DST, DST/0 or DST/0/items.

    Raises BadInput where there is none, and where DST holds other steps: a training run's directory of checkpoints.
    """
    path = checkpoint_at(checkpoint)
    for part in ("", "items"):
        if (path / part / METADATA).read() is not None:
            return path / part if part else path
    steps = sorted(int(name) for name in path.children() if name.isdigit() and is_orbax(path / name))
    if not steps:
        raise BadInput(f"{checkpoint} holds no Orbax checkpoint: no {METADATA} in it, in items/ or in 0/items/")
    if steps != [0]:
        named = ", ".join(map(str, steps))
        raise BadInput(f"{checkpoint} is a training run's, of steps {named}: name one, such as {path / str(steps[-1])}")
    return path / "0/items"


def is_orbax(checkpoint: Where) -> bool:
    """Whether it is DST, DST/0 or DST/0/items of a checkpoint."""
    path = checkpoint_at(checkpoint)
    return any((path / part / METADATA).read() is not None for part in PARTS)


def array_spec(items: Location, name: str, *, ocdbt: bool, zarr3: bool) -> dict[str, Any]:
    """TensorStore's spec for the leaf with the dotted `name`."""
    kvstore = {"driver": "ocdbt", "base": items.spec, "path": f"{name}/"} if ocdbt else (items / name).spec
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}


class OrbaxSource:
    """The leaves of one checkpoint, by path such as `params/params/decoder/decoder_norm/scale`.

    wanted: whether to open a leaf. Opening one reads its metadata; those left out are listed in `unopened`.
    cache_bytes: decoded chunks that are kept, for readers that come back to a chunk for another part of it.
    """

    def __init__(
        self, checkpoint: Where, *, wanted: Callable[[Keys], bool] = lambda keys: True, cache_bytes: int = 0
    ) -> None:
        self.items = items_of(checkpoint)
        self.metadata = _read_json(self.items / METADATA)
        self.step_metadata = _read_json(self.items.parent / STEP_METADATA)
        ocdbt = self.metadata.get("use_ocdbt")
        self.ocdbt = (self.items / MANIFEST).read() is not None if ocdbt is None else bool(ocdbt)
        self.zarr3 = bool(self.metadata.get("use_zarr3", False))
        self.unopened: list[Keys] = []
        self._arrays = self._open(wanted, cache_bytes)
        self.tensors: Mapping[str, TensorInfo] = {
            path: TensorInfo(path, tuple(array.shape), array.dtype.name, str(self.items))
            for path, array in self._arrays.items()
        }

    @property
    def scan_layers(self) -> bool | None:
        """MaxText's own note of how the layers are stored, None where it left none."""
        value = (self.step_metadata.get("custom_metadata") or {}).get("scan_layers")
        return None if value is None else bool(value)

    def _open(self, wanted: Callable[[Keys], bool], cache_bytes: int) -> dict[str, Any]:
        context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}, **cloud_place.TENSORSTORE_REQUESTS})
        futures = {}
        for entry in self.metadata["tree_metadata"].values():
            keys = tuple(str(part["key"]) for part in entry["key_metadata"])
            if entry["value_metadata"].get("skip_deserialize") or entry["value_metadata"]["value_type"] == "None":
                continue
            if not wanted(keys):
                self.unopened.append(keys)
                continue
            spec = array_spec(self.items, ".".join(keys), ocdbt=self.ocdbt, zarr3=self.zarr3)
            futures["/".join(keys)] = ts.open(spec, open=True, read=True, context=context)
        arrays = {}
        for path, future in futures.items():
            try:
                arrays[path] = future.result()
            except ValueError as error:
                raise self._explained(f"leaf {path} is named in {METADATA} but cannot be opened", error) from error
        return arrays

    def _explained(self, what: str, error: ValueError) -> FerryError:
        lasting = self.items.local is not None or str(error).startswith(LASTING)
        return (BadInput if lasting else OutsideFailure)(f"{self.items}: {what}: {tensorstore_reason(error)}")

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the chunks that the leaf is stored in, each of which is read and decoded as a whole."""
        return tuple(self._arrays[name].chunk_layout.write_chunk.shape or ())  # a scalar has None

    def read(self, name: str, box: Box | None = None) -> Array:
        array = self._arrays.get(name)
        if array is None:
            raise BadInput(f"{self.items} has no leaf {name}")
        view = array if box is None else array[slices(box)]
        try:
            return np.asarray(view.read().result())
        except ValueError as error:
            raise self._explained(f"leaf {name} cannot be read", error) from error

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        return (StoredSlice.of(self.tensors[name], box),)


def open_orbax(checkpoint: Where) -> OrbaxSource:
    """Opens DST, DST/0 or DST/0/items. Raises BadInput where it is no Orbax checkpoint."""
    return OrbaxSource(checkpoint)


def _read_json(path: Location) -> dict[str, Any]:
    """Empty where there is no such file."""
    content = path.read()
    try:
        value = {} if content is None else json.loads(content)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} should hold a JSON object")
    return value
