"""Writes a MaxText checkpoint: arrays with TensorStore, Orbax's metadata by hand.

Layout of `items/` (Orbax's PyTreeCheckpointHandler, as MaxText 0.2.5 leaves it)::

    OCDBT:      ocdbt.process_<n>/{manifest.ocdbt, d/*} have the data; manifest.ocdbt and d/* in items/ refer to them
    otherwise:  <dotted.leaf.name>/{zarr.json or .zarray, chunks}
    _METADATA names the leaves and says which of the two it is.

Neither jax nor orbax is imported.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import tensorstore as ts

from conversion_lib.core.boxes import Box, slices, whole
from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput, OutsideFailure, tensorstore_reason
from conversion_lib.plan.plan import ArrayPlan, Plan
from conversion_lib.record import COMMIT_NAME, Target
from conversion_lib.sinks import ocdbt
from conversion_lib.sources.orbax import METADATA, STEP_METADATA
from conversion_lib.storage import gcs
from conversion_lib.storage.interface import Location

STEP_LEAF = "step"
ZSTD_LEVEL = {True: 3, False: 1}
"""The zstd levels of MaxText's arrays: for zarr3 (True) and for zarr2 (False)."""

FOLDER = "ocdbt.process_"
CLOUD_STREAMS = 8


class OrbaxSink:
    """Writes the step directory of a MaxText checkpoint, DST/0.

    Each part writes to its own folders of the OCDBT store. In a bucket, a part has several folders, because a folder
    allows one commit a second and sends one data file at a time. `finish` completes all parts, and needs no `open`.

    Args:
        build: Where the step directory is built.
        plan: The whole plan.
        target: The layout to write.
        part: The index of the part to write.
        threads: The number of threads that encode chunks.
    """

    def __init__(self, build: Location, plan: Plan, target: Target, *, part: int = 0, threads: int = 2) -> None:
        self._build, self._plan, self._target = build, plan, target
        self._items = build / "items"
        streams = CLOUD_STREAMS if build.local is None and target.ocdbt else 1
        self._folders = [f"{FOLDER}{part * streams + stream}" for stream in range(streams)]
        # merging by reference needs one context for all stores; chunks are written once, so nothing is cached
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "data_copy_concurrency": {"limit": threads},
                **gcs.TENSORSTORE_REQUESTS,
            }
        )
        self._arrays: list[list[Any]] = []
        self._writes = 0

    def open(self) -> None:
        self._items.make()
        opened = [[self._open(self._spec(array, folder)) for array in self._plan.arrays] for folder in self._folders]
        step = self._open(_step_spec(self._kvstore(STEP_LEAF, self._folders[0]), self._target))
        self._arrays = [[_result(future) for future in futures] for futures in opened]
        _result(_result(step).write(np.int64(0)))

    def _open(self, spec: dict[str, Any]) -> Any:
        return ts.open(spec, create=True, open=True, context=self._context)

    def _kvstore(self, name: str, folder: str) -> dict[str, Any]:
        if not self._target.ocdbt:
            return (self._items / name).spec
        base = (self._items / folder).spec
        return {"driver": "ocdbt", "base": base, "path": f"{name}/", "config": ocdbt.CONFIG}

    def _spec(self, array: ArrayPlan, folder: str) -> dict[str, Any]:
        kvstore = self._kvstore(_leaf_name(array), folder)
        shape, chunk = list(array.shape), list(array.chunk_shape)
        return _array_spec(kvstore, shape, chunk, array.dtype, self._target)

    def write(self, array: int, box: Box, data: Array) -> TensorStoreWrite:
        folder = self._arrays[self._writes % len(self._folders)]
        self._writes += 1
        # The engine reuses the buffer when the write is durable. TensorStore refers to it only until then: chunks are
        # encoded into separate bytes, and since the cache has size 0, none is kept afterwards.
        future = folder[array][slices(box)].write(data, can_reference_source_data_indefinitely=True)
        return TensorStoreWrite(future, self._plan.arrays[array].path)

    def finish(self) -> None:
        """Removes leftovers, merges the parts, and writes the metadata and at last the commit markers.

        Raises:
            BadInput: A chunk is missing that was written before.
            OutsideFailure: Writing failed.
        """
        self._sweep_locks()
        if self._target.ocdbt:
            self._merge()
        self._require_every_chunk()
        started = time.time_ns()
        (self._items / METADATA).write(json.dumps(self._tree_metadata()).encode())
        (self._build / STEP_METADATA).write(json.dumps(self._step_metadata(started)).encode())
        for directory in (self._items, self._build):
            (directory / COMMIT_NAME).write(f"Checkpoint commit was successful to {directory}".encode())
        self._sweep_locks()
        self._build.settle()

    def _sweep_locks(self) -> None:
        """Removes lock files of killed processes; in a bucket, TensorStore has no lock files."""
        if self._items.local is not None:
            self._items.remove(path for path in self._items.below() if path.endswith(".__lock"))

    def _merge(self) -> None:
        below = self._items.below()
        # an earlier try may have been killed during the merge
        self._items.remove(path for path in below if path == ocdbt.MANIFEST or path.startswith("d/"))
        folders = sorted({path.partition("/")[0] for path in below if path.startswith(FOLDER)})
        with _outside("merging the written arrays"):
            ocdbt.merge(self._items, folders, self._context)
            ocdbt.sweep(self._items, folders, self._context)

    def _require_every_chunk(self) -> None:
        """Lists the store once, and raises BadInput if a chunk of the plan is missing, whatever the journal says."""
        with _outside("listing the written chunks"):
            spec = self._items.spec
            directory = ts.KvStore.open(spec, context=self._context).result()
            store = ocdbt.store(self._items, self._context) if self._target.ocdbt else directory
            keys = {bytes(key).decode() for key in store.list().result()}
        for array in self._plan.arrays:
            for chunk in array.chunks_in(whole(array.shape)):
                if f"{_leaf_name(array)}/{_chunk_key(chunk, self._target)}" not in keys:
                    raise BadInput(
                        f"{self._items}: array {array.path} has no chunk {chunk}, although it was written: another "
                        "process removed it; run `ferry clean` on the destination and convert again"
                    )

    def _tree_metadata(self) -> dict[str, Any]:
        tree = [_leaf([STEP_LEAF], {"value_type": "scalar", "skip_deserialize": False})]
        for array in self._plan.arrays:
            value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(array.chunk_shape)}
            tree.append(_leaf(array.path.split("/"), value))
        tree.append(_leaf(["opt_state"], {"value_type": "Dict", "skip_deserialize": True}))
        return {
            "tree_metadata": dict(tree),
            "use_ocdbt": self._target.ocdbt,
            "use_zarr3": self._target.zarr3,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }

    def _step_metadata(self, started: int) -> dict[str, Any]:
        handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
        return {
            "item_handlers": {"items": handler},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {"scan_layers": self._target.scan_layers},
        }


class TensorStoreWrite:
    """One write of a chunk-aligned box."""

    def __init__(self, future: Any, path: str) -> None:
        self._future, self._path = future, path

    def start(self) -> None:
        self._future.commit.force()

    def done(self) -> bool:
        return bool(self._future.commit.done())

    def wait(self) -> None:
        with _outside(f"writing {self._path}"):
            self._future.commit.result()


class _outside:  # noqa: N801 - reads as a word in a with statement
    """Turns TensorStore's errors into OutsideFailure, because their cause is the disk or the network."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, OSError, RuntimeError)):
            reason = tensorstore_reason(error)
            hint = "; free some space, and run the same command again" if "No space left" in reason else ""
            raise OutsideFailure(f"{self._doing} failed: {reason}{hint}") from error


def _result(future: Any) -> Any:
    with _outside("opening the destination's arrays"):
        return future.result()


def _array_spec(
    kvstore: dict[str, Any], shape: list[int], chunk: list[int], dtype: str, target: Target
) -> dict[str, Any]:
    """Returns TensorStore's spec of an array, with MaxText's codecs."""
    zstd, level = target.compression == "zstd", ZSTD_LEVEL[target.zarr3]
    if target.zarr3:
        codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if zstd:
            codecs.append({"name": "zstd", "configuration": {"level": level}})
        metadata: dict[str, Any] = {
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": codecs,
        }
    else:
        metadata = {
            "shape": shape,
            "chunks": chunk,
            "dtype": {"bfloat16": "bfloat16", "float32": "<f4", "int64": "<i8"}[dtype],
            "compressor": {"id": "zstd", "level": level} if zstd else None,
            "order": "C",
            "fill_value": None,
            "filters": None,
            "dimension_separator": ".",
        }
    return {
        "driver": "zarr3" if target.zarr3 else "zarr",
        "kvstore": kvstore,
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }


def _leaf_name(array: ArrayPlan) -> str:
    """Returns an array's name in the store."""
    return array.path.replace("/", ".")


def _chunk_key(chunk: tuple[int, ...], target: Target) -> str:
    """Returns the key of a chunk under its array's name: zarr3's default encoding, or zarr2's with dots."""
    if target.zarr3:
        return "/".join(["c", *map(str, chunk)])
    return ".".join(map(str, chunk)) or "0"


def _step_spec(kvstore: dict[str, Any], target: Target) -> dict[str, Any]:
    """Returns the spec of the training step, a scalar next to the parameters."""
    return _array_spec(kvstore, [], [], "int64", target)


def _leaf(keys: list[str], value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return str(tuple(keys)), {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}
