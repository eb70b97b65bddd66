"""Restores checkpoints as MaxText's `from_pretrained` does, in MaxText's environment.

    python restore_worker.py JOBS.json RESULTS.json

A job is `{"items", "ocdbt", "zarr3", "pathways"}`; its result `{path: [shape, dtype, sha256 of the values]}`, or
`{"error"}`. pathways: with Orbax's own array handler for Pathways. What that handler asks its server for is read here
in the server's place: each array, by its name, as a zarr array below the checkpoint's directory.

This file imports nothing of Ferry.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint._src.serialization import cloud_pathways_array_handler, cloud_pathways_helper


def restore(items: str, ocdbt: bool, zarr3: bool, pathways: bool) -> dict[str, list]:
    if pathways:
        handler = cloud_pathways_array_handler.CloudPathwaysArrayHandler(use_ocdbt=ocdbt)
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    # the settings of model_creation_utils.from_pretrained; 96 is MaxText's checkpoint_storage_concurrent_gb
    handler = ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=96, save_concurrent_gb=96, use_ocdbt=ocdbt, use_zarr3=zarr3
    )
    checkpointer = ocp.Checkpointer(handler)
    metadata = checkpointer.metadata(items).item_metadata.tree["params"]["params"]
    target = jax.tree.map(_abstract, metadata)
    restored = checkpointer.restore(
        items,
        item={"params": {"params": target}},
        transforms={},
        restore_args={"params": {"params": ocp.checkpoint_utils.construct_restore_args(target)}},
    )
    flat, _ = jax.tree_util.tree_flatten_with_path(restored["params"]["params"])
    return {"/".join(str(key.key) for key in path): _described(np.asarray(array)) for path, array in flat}


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    """As MaxText's model has it: sharded over a mesh of all devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
    even = leaf.shape and leaf.shape[0] % len(jax.devices()) == 0
    spec = jax.sharding.PartitionSpec("fsdp" if even else None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))


def _described(array: np.ndarray) -> list:
    return [list(array.shape), array.dtype.name, hashlib.sha256(array.tobytes()).hexdigest()]


def _read_in_place_of_the_server(location, names, dtypes, shapes, shardings, devices, timeout):
    """`cloud_pathways_helper.read_arrays` without a Pathways server to send the request to."""
    arrays = []
    for name, dtype, shape, sharding in zip(names, dtypes, shapes, shardings, strict=True):
        store = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{location}/{name}/"}}
        stored = ts.open(store, open=True, read=True).result().read().result()
        assert (stored.shape, stored.dtype) == (tuple(shape), dtype)
        arrays.append(jax.device_put(stored, sharding))
    return arrays, _Done()


class _Done:
    def result(self) -> None:
        return None


def main(jobs: Path, results: Path) -> None:
    cloud_pathways_helper.read_arrays = _read_in_place_of_the_server
    answers = []
    for job in json.loads(jobs.read_text()):
        try:
            answers.append(restore(**job))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    results.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
