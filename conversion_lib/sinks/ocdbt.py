"""Merging OCDBT stores by reference, and sweeping what kills left in them.

A store is a directory with `manifest.ocdbt`, which names the root of a B+tree for each version, and data files `d/*`
that hold values and tree nodes. Every commit writes new nodes; old ones, and data of writes that were never
committed, stay behind until they are swept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from conversion_lib.storage.interface import Location

MANIFEST = "manifest.ocdbt"
CONFIG = {"max_inline_value_bytes": 1024}
"""As MaxText's checkpoints have it: smaller values lie in the tree itself."""


def store(directory: Location, context: Any) -> Any:
    """The OCDBT store in `directory`, made where there is none."""
    spec = {"driver": "ocdbt", "base": directory.spec, "config": CONFIG}
    return ts.KvStore.open(spec, context=context).result()


def merge(items: Location, parts: Sequence[str], context: Any) -> None:
    """Makes the store at `items` refer to everything that the stores `parts`, directories in it, hold; no data move.

    context: the one that the parts were written with; TensorStore copies by reference only within one.
    """
    whole = store(items, context)
    with ts.Transaction(atomic=True) as transaction:
        for part in parts:
            store(items / part, context).experimental_copy_range_to(whole.with_transaction(transaction)).result()


def sweep(items: Location, parts: Sequence[str], context: Any) -> None:
    """Removes data files that the newest version of no store refers to.

    The parts' own trees are kept whole, so that a run that is killed after this can still be resumed.
    """
    directories = ["", *(f"{part}/" for part in parts)]
    kept = {f"{directory}{file}" for directory in directories for file in _referenced(items / directory, context)}
    data = {f"{directory}d/" for directory in directories}
    items.remove(path for path in items.below() if path not in kept and path[: path.rfind("/") + 1] in data)


def _referenced(directory: Location, context: Any) -> set[str]:
    """The data files that the newest version of the store in `directory` and its tree of versions are made of.

    A commit reads the tree of versions, which begins with the seventeenth, though none of the versions it lists.
    """
    base = ts.KvStore.open(directory.spec, context=context).result()
    manifest = ts.ocdbt.dump(base, context=context).result()
    roots = [version["root"] for version in manifest["versions"][-1:]] + manifest["version_tree_nodes"]
    files: set[str] = set()
    pending = [root["location"] for root in roots if "location" in root]
    while pending:
        files.update(map(_file_of, pending))
        nodes = [ts.ocdbt.dump(base, location, context=context) for location in pending]
        entries = [entry for node in nodes for entry in node.result()["entries"]]
        files.update(_file_of(entry["indirect_value"]) for entry in entries if "indirect_value" in entry)
        pending = [entry["location"] for entry in entries if "location" in entry]
    return files


def _file_of(location: str) -> str:
    """The file in `<kind>:<base>:<path>:<offset>:<length>`, as TensorStore writes a location."""
    _, base, path, _, _ = location.split(":")
    return unquote(base) + unquote(path)
