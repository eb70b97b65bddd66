"""Restores a checkpoint with the real Orbax, as numpy: what any reader of the format sees."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def restore(items: Path) -> dict[str, np.ndarray]:
    """The leaves under params/params of the checkpoint at DST/0/items, by path."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(items).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(items, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    flat, _ = jax.tree_util.tree_flatten_with_path(restored["params"]["params"])
    return {"/".join(part.key for part in path): leaf for path, leaf in flat}
