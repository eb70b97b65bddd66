"""Merges OCDBT stores by reference, and removes data files that are no longer used.

A store is a directory with `manifest.ocdbt`, which names the root of a B+tree for each version, and data files `d/*`
with values and tree nodes. Every commit writes new nodes. Old nodes, and data of writes that were never committed, stay
until they are removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from conversion_lib.storage.interface import Location

MANIFEST = "manifest.ocdbt"
CONFIG = {"max_inline_value_bytes": 1024}
"""As in MaxText's checkpoints: smaller values are stored in the tree itself."""


def store(directory: Location, context: Any) -> Any:
    """Opens the OCDBT store in `directory`, and creates it if there is none; `context` is a TensorStore context."""
    spec = {"driver": "ocdbt", "base": directory.spec, "config": CONFIG}
    return ts.KvStore.open(spec, context=context).result()


def merge(items: Location, parts: Sequence[str], context: Any) -> None:
    """Makes the store at `items` refer to all values of other stores. No data are copied.

    Args:
        items: The directory of the merged store.
        parts: The names of the other stores' directories in `items`.
        context: The TensorStore context with which the parts were opened for writing. TensorStore copies by reference
            only within one context.
    """
    whole = store(items, context)
    with ts.Transaction(atomic=True) as transaction:
        for part in parts:
            store(items / part, context).experimental_copy_range_to(whole.with_transaction(transaction)).result()


def sweep(items: Location, parts: Sequence[str], context: Any) -> None:
    """Removes data files that no store's newest version refers to.

    The trees of the parts stay complete, so that a run that is killed afterwards can still be resumed.

    Args:
        items: As for `merge`.
        parts: As for `merge`.
        context: A TensorStore context.
    """
    directories = {"": items, **{f"{part}/": items / part for part in parts}}
    kept = {f"{prefix}{file}" for prefix, directory in directories.items() for file in _referenced(directory, context)}
    data = {f"{prefix}d/" for prefix in directories}
    items.remove(path for path in items.below() if path not in kept and path[: path.rfind("/") + 1] in data)


def _referenced(directory: Location, context: Any) -> set[str]:
    """Returns the data files of the newest version of a store, and of its tree of versions.

    A commit reads the tree of versions, which exists from the seventeenth version on, but not the versions in it.
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
    """Returns the file of a location, which TensorStore writes as `<kind>:<base>:<path>:<offset>:<length>`."""
    _, base, path, _, _ = location.split(":")
    return unquote(base) + unquote(path)
