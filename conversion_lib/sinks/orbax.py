"""Writes a MaxText checkpoint: arrays with TensorStore, Orbax's metadata by hand.

Layout of `items/` (Orbax's PyTreeCheckpointHandler, as MaxText 0.2.5 leaves it)::

    OCDBT:    ocdbt.process_<part>/{manifest.ocdbt, d/*} hold the data; manifest.ocdbt and d/* beside them refer to it
    else:     <dotted.leaf.name>/{zarr.json or .zarray, chunks}
    _METADATA names the leaves and says which of the two it is.

Nothing of jax or orbax is imported.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from conversion_lib.boxes import Box, slices, whole
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.files import in_parallel, sync_directory, write_atomically
from conversion_lib.plan import ArrayPlan, Plan
from conversion_lib.record import COMMIT_NAME, Target
from conversion_lib.sinks import ocdbt
from conversion_lib.sources.base import Array
from conversion_lib.sources.orbax import METADATA, STEP_METADATA, directory_spec

STEP_LEAF = "step"
ZSTD_LEVEL = {True: 3, False: 1}
"""By whether the arrays are zarr3: the levels that MaxText's arrays have."""

SYNC_THREADS = 8
"""Without OCDBT there are as many directories as chunks, and syncing one is mostly waiting."""


class OrbaxSink:
    """The step directory `build` (to become DST/0) of one checkpoint.

    part: whose folder of the OCDBT store is written to. `finish` is for all parts at once, and needs no `open`.
    """

    def __init__(self, build: Path, plan: Plan, target: Target, *, part: int = 0, threads: int = 2) -> None:
        self._build, self._plan, self._target = build, plan, target
        self._items = build / "items"
        self._part_dir = self._items / f"ocdbt.process_{part}"
        # merging by reference needs one context for all stores; chunks are written once, so nothing is cached
        self._context = ts.Context(
            {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": threads}}
        )
        self._arrays: list[Any] = []

    def open(self) -> None:
        self._items.mkdir(parents=True, exist_ok=True)
        opened = [
            ts.open(self._spec(array), create=True, open=True, context=self._context) for array in self._plan.arrays
        ]
        step = ts.open(
            _step_spec(self._kvstore(STEP_LEAF), self._target), create=True, open=True, context=self._context
        )
        self._arrays = [_result(future) for future in opened]
        _result(_result(step).write(np.int64(0)))

    def _kvstore(self, name: str) -> dict[str, Any]:
        if self._target.ocdbt:
            return {
                "driver": "ocdbt",
                "base": directory_spec(self._part_dir),
                "path": f"{name}/",
                "config": ocdbt.CONFIG,
            }
        return directory_spec(self._items / name)

    def _spec(self, array: ArrayPlan) -> dict[str, Any]:
        kvstore = self._kvstore(_leaf_name(array))
        shape, chunk = list(array.shape), list(array.chunk_shape)
        return _array_spec(kvstore, shape, chunk, array.dtype, self._target)

    def write(self, array: int, box: Box, data: Array) -> TensorStoreWrite:
        # The engine uses the buffer again once the write is durable. TensorStore may refer to it until then only:
        # chunks are encoded into bytes of their own, and with a cache of no size none is kept after that.
        future = self._arrays[array][slices(box)].write(data, can_reference_source_data_indefinitely=True)
        return TensorStoreWrite(future, self._plan.arrays[array].path)

    def finish(self) -> None:
        """Sweeps, merges, and writes the metadata, the commit marks last. Raises BadInput where a chunk is missing."""
        _sweep_locks(self._items)
        if self._target.ocdbt:
            self._merge()
        self._require_every_chunk()
        started = time.time_ns()
        write_atomically(self._items / METADATA, json.dumps(self._tree_metadata()).encode())
        write_atomically(self._build / STEP_METADATA, json.dumps(self._step_metadata(started)).encode())
        for directory in (self._items, self._build):
            text = f"Checkpoint commit was successful to {directory}"
            write_atomically(directory / COMMIT_NAME, text.encode())
        _sweep_locks(self._items)
        directories = {path.parent for path in self._build.rglob("*")}
        in_parallel(lambda directory, _: sync_directory(directory), directories, threads=SYNC_THREADS)

    def _merge(self) -> None:
        for leftover in (self._items / ocdbt.MANIFEST, self._items / "d"):
            # an earlier try may have been killed while merging
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        parts = sorted(self._items.glob("ocdbt.process_*"))
        with _outside("merging what was written"):
            ocdbt.merge(self._items, parts, self._context)
            ocdbt.sweep(self._items, parts)

    def _require_every_chunk(self) -> None:
        """One listing of the store: what a journal says is written is held against what is there."""
        with _outside("listing what was written"):
            store = ocdbt.store(self._items, self._context) if self._target.ocdbt else _directory_store(self._items)
            keys = {bytes(key).decode() for key in store.list().result()}
        for array in self._plan.arrays:
            for chunk in array.chunks_in(whole(array.shape)):
                if f"{_leaf_name(array)}/{_chunk_key(chunk, self._target)}" not in keys:
                    raise BadInput(
                        f"{self._items}: array {array.path} lacks its chunk {chunk}, which was noted as written: "
                        "something else removed it; run `ferry clean` on the destination and convert again"
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
    """Turns TensorStore's errors into OutsideFailure: they are the disk's, or the network's."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, OSError, RuntimeError)):
            # TensorStore adds its whole spec to what it says
            reason = str(error).partition(" [tensorstore_spec=")[0]
            hint = "; free some space and run the same command again" if "No space left" in reason else ""
            raise OutsideFailure(f"{self._doing} failed: {reason}{hint}") from error


def _result(future: Any) -> Any:
    with _outside("opening the destination's arrays"):
        return future.result()


def _array_spec(
    kvstore: dict[str, Any], shape: list[int], chunk: list[int], dtype: str, target: Target
) -> dict[str, Any]:
    """TensorStore's spec of one array, with MaxText's codecs."""
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
    """An array's name in the store."""
    return array.path.replace("/", ".")


def _chunk_key(chunk: tuple[int, ...], target: Target) -> str:
    """The key of a chunk below its array's name: zarr3's default encoding, or zarr 2's with dots."""
    if target.zarr3:
        return "/".join(["c", *map(str, chunk)])
    return ".".join(map(str, chunk)) or "0"


def _directory_store(directory: Path) -> Any:
    return ts.KvStore.open(directory_spec(directory)).result()


def _step_spec(kvstore: dict[str, Any], target: Target) -> dict[str, Any]:
    """The training step, 0: a scalar beside the parameters."""
    return _array_spec(kvstore, [], [], "int64", target)


def _leaf(keys: list[str], value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return str(tuple(keys)), {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}


def _sweep_locks(items: Path) -> None:
    """Removes the lock files that a killed TensorStore leaves."""
    for lock in items.rglob("*.__lock"):
        lock.unlink(missing_ok=True)
