"""Reads a MaxText checkpoint: arrays in Orbax's layout, read with TensorStore.

Layout of Orbax's `PyTreeCheckpointHandler`: `<DST>/0/items/_METADATA` names the leaves of the tree. Each leaf is a zarr
(2 or 3) array, either in one OCDBT store at `items/` under the leaf's dotted name, or in a directory of that name.
Neither jax nor orbax is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import tensorstore as ts
from pydantic import BaseModel, ConfigDict, Field

from conversion_lib.core.boxes import Box, slices
from conversion_lib.core.tensors import Array, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput, FerryError, OutsideFailure, tensorstore_reason
from conversion_lib.record import CheckpointRecord, parsed, record_in
from conversion_lib.sources.zarr_metadata import open_arrays
from conversion_lib.storage import gcs
from conversion_lib.storage.interface import Location
from conversion_lib.storage.links import refuse_links_out
from conversion_lib.storage.locations import location

METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
MANIFEST = "manifest.ocdbt"

METADATA_PATHS = (METADATA, f"items/{METADATA}", f"0/items/{METADATA}")
"""Paths from DST/0/items, DST/0 and DST to the file that names the leaves."""

LASTING = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "PERMISSION_DENIED")
"""First words of TensorStore's errors about a bucket that a retry does not solve."""

Where = str | Path | Location
"""Where a checkpoint is: a path, gs://bucket/prefix, or a location."""

Metadata = TypeVar("Metadata", bound=BaseModel)
Keys = tuple[str, ...]
"""A leaf's keys in the tree, from the root. The index of a list is written in decimal digits."""


def checkpoint_at(checkpoint: Where) -> Location:
    """Returns the absolute location of DST, DST/0 or DST/0/items, whichever is given.

    Raises:
        BadInput: A URL has another scheme than gs://.
    """
    return (location(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint).absolute()


def root_of(checkpoint: Where) -> Location:
    """Returns DST for DST, DST/0 or DST/0/items.

    Raises:
        BadInput: As `checkpoint_at` raises it.
    """
    root = checkpoint_at(checkpoint)
    for last in ("items", "0"):
        if str(root).endswith(f"/{last}"):
            root = root.parent
    return root


def record_of(checkpoint: Where) -> CheckpointRecord | None:
    """Returns the record of the checkpoint at DST, DST/0 or DST/0/items; None if there is none.

    Raises:
        BadInput: As `record_in` raises it.
        OutsideFailure: A bucket cannot be read.
    """
    root = root_of(checkpoint)
    return record_in(lambda name: (root / name).read(), str(root))


def items_of(checkpoint: Where) -> Location:
    """Returns the `items` of DST, DST/0 or DST/0/items.

    Raises:
        BadInput: There is no Orbax checkpoint, or DST has other steps than 0, as a training run writes them.
        OutsideFailure: A bucket cannot be read.
    """
    path = checkpoint_at(checkpoint)
    for items in (path, path / "items"):
        if (items / METADATA).read() is not None:
            return items
    numbered = (name for name in path.children() if name.isascii() and name.isdigit())
    steps = sorted(int(name) for name in numbered if is_orbax(path / name))
    if not steps:
        raise BadInput(f"{checkpoint} has no Orbax checkpoint: no {METADATA} in it, in items/ or in 0/items/")
    if steps != [0]:
        named = ", ".join(map(str, steps))
        raise BadInput(f"{checkpoint} has a training run's steps {named}: name one, such as {path / str(steps[-1])}")
    return path / "0/items"


def is_orbax(checkpoint: Where) -> bool:
    """Returns whether the location is DST, DST/0 or DST/0/items of a checkpoint.

    Raises:
        BadInput: As `checkpoint_at` raises it.
        OutsideFailure: A bucket cannot be read.
    """
    path = checkpoint_at(checkpoint)
    return any((path / name).read() is not None for name in METADATA_PATHS)


def array_spec(items: Location, name: str, *, ocdbt: bool, zarr3: bool) -> dict[str, Any]:
    """Returns TensorStore's spec of the leaf with the dotted `name`."""
    where = items / name
    kvstore = {"driver": "ocdbt", "base": items.spec, "path": f"{name}/"} if ocdbt else where.spec
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}


class _Key(BaseModel):
    key: str | int


class _Value(BaseModel):
    value_type: str
    skip_deserialize: bool | None = None


class _Leaf(BaseModel):
    key_metadata: Annotated[list[_Key], Field(min_length=1)]
    value_metadata: _Value


class TreeMetadata(BaseModel):
    """`_METADATA`: the leaves of the tree, and how they are stored."""

    model_config = ConfigDict(extra="allow")

    tree_metadata: dict[str, _Leaf]
    use_ocdbt: bool | None = None
    use_zarr3: bool | None = None


class _Custom(BaseModel):
    scan_layers: bool | None = None


class StepMetadata(BaseModel):
    """`_CHECKPOINT_METADATA`, of which only MaxText's own part is read."""

    custom_metadata: _Custom | None = None


class OrbaxSource:
    """The leaves of one checkpoint by path, such as `params/params/decoder/decoder_norm/scale`.

    Args:
        checkpoint: DST, DST/0 or DST/0/items.
        wanted: Returns whether to open the leaf with the given keys. Opening a leaf reads its metadata.
        cache_bytes: The most memory for decoded chunks, for readers that read several parts of a chunk. 0 keeps none.

    Attributes:
        items: The location of `items`.
        unopened: The keys of the leaves that were not opened.
        ocdbt: Whether the leaves are in an OCDBT store.
        zarr3: Whether the arrays are zarr 3, not zarr 2.

    Raises:
        BadInput: It is not an Orbax checkpoint, or a leaf that is named in it cannot be opened.
        OutsideFailure: A bucket cannot be read.
    """

    def __init__(
        self, checkpoint: Where, *, wanted: Callable[[Keys], bool] = lambda keys: True, cache_bytes: int = 0
    ) -> None:
        self.items = items_of(checkpoint)
        if self.items.local is not None:
            refuse_links_out(self.items.local, within=root_of(self.items).local)
        self.metadata = _read(TreeMetadata, self.items / METADATA)
        self.step_metadata = _read(StepMetadata, self.items.parent / STEP_METADATA)
        ocdbt = self.metadata.use_ocdbt
        self.ocdbt = (self.items / MANIFEST).read() is not None if ocdbt is None else ocdbt
        self.zarr3 = bool(self.metadata.use_zarr3)
        self.unopened: list[Keys] = []
        self._arrays = self._open(wanted, cache_bytes)
        self.tensors: Mapping[str, TensorInfo] = {
            path: TensorInfo(path, tuple(array.shape), array.dtype.name, str(self.items))
            for path, array in self._arrays.items()
        }

    @property
    def scan_layers(self) -> bool | None:
        """Whether the layers are stacked, as MaxText noted it; None if there is no note."""
        custom = self.step_metadata.custom_metadata
        return None if custom is None else custom.scan_layers

    def _open(self, wanted: Callable[[Keys], bool], cache_bytes: int) -> dict[str, Any]:
        context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}, **gcs.TENSORSTORE_REQUESTS})
        specs = {}
        for entry in self.metadata.tree_metadata.values():
            keys = tuple(str(part.key) for part in entry.key_metadata)
            if entry.value_metadata.skip_deserialize or entry.value_metadata.value_type == "None":
                continue
            if not wanted(keys):
                self.unopened.append(keys)
                continue
            specs["/".join(keys)] = array_spec(self.items, ".".join(keys), ocdbt=self.ocdbt, zarr3=self.zarr3)
        try:
            futures = open_arrays(specs, context, self.items)
        except ValueError as error:
            raise self._explained("metadata of arrays cannot be read", error) from error
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
        """Returns the shape of the leaf's stored chunks. A chunk is read and decoded as a whole."""
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
    """Opens all leaves of DST, DST/0 or DST/0/items.

    Raises:
        BadInput: As OrbaxSource raises it.
        OutsideFailure: As OrbaxSource raises it.
    """
    return OrbaxSource(checkpoint)


def _read(kind: type[Metadata], path: Location) -> Metadata:
    """Returns what Orbax wrote to a file, or the defaults if there is no file. Raises BadInput if it is damaged."""
    return parsed(kind, path.read() or b"{}", path, "metadata file of Orbax")
