"""Restores a checkpoint with Orbax, sharded over 16 simulated devices on one axis, as a training run does.

    python restore.py CKPT first|last

Prints the seconds from the call to the arrays being there, wall and processor time, and the bytes restored; start-up
is not counted. Arrays
whose axis 16 does not divide (norms, mostly) are restored whole on each device.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

DEVICES = 16


def restore(items: Path, axis: int) -> dict[str, float]:
    import jax
    import orbax.checkpoint as ocp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((DEVICES,), ("shards",))

    def arguments(leaf: Any) -> ocp.RestoreArgs:
        shape = leaf.shape
        spec: list[str | None] = [None] * len(shape)
        if shape and shape[axis] % DEVICES == 0:
            spec[axis] = "shards"
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(items).item_metadata.tree
        wanted = jax.tree.map(arguments, tree)
        started, cpu = time.perf_counter(), time.process_time()
        restored = checkpointer.restore(items, args=ocp.args.PyTreeRestore(restore_args=wanted))
        arrays = jax.block_until_ready(jax.tree.leaves(restored["params"]))
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "bytes": sum(array.nbytes for array in arrays),
        }


def main() -> None:
    os.environ.update(XLA_FLAGS=f"--xla_force_host_platform_device_count={DEVICES}", JAX_PLATFORMS="cpu")
    items = Path(sys.argv[1]).absolute() / "0" / "items"
    print(json.dumps(restore(items, {"first": 0, "last": -1}[sys.argv[2]])))


if __name__ == "__main__":
    main()
