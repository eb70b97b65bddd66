"""Merging OCDBT stores by reference, and sweeping what kills left in them.

A store is a directory with `manifest.ocdbt`, which names the root of a B+tree for each version, and data files `d/*`
that hold values and tree nodes. Every commit writes new nodes; old ones, and data of writes that were never
committed, stay behind until they are swept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from conversion_lib.sources.orbax import directory_spec

MANIFEST = "manifest.ocdbt"
CONFIG = {"max_inline_value_bytes": 1024}
"""As MaxText's checkpoints have it: smaller values lie in the tree itself."""


def store(directory: Path, context: Any) -> Any:
    """The OCDBT store in `directory`, made where there is none."""
    spec = {"driver": "ocdbt", "base": directory_spec(directory), "config": CONFIG}
    return ts.KvStore.open(spec, context=context).result()


def merge(items: Path, parts: list[Path], context: Any) -> None:
    """Makes the store at `items` refer to everything that the stores `parts` below it hold; no data move.

    context: the one that the parts were written with; TensorStore copies by reference only within one.
    """
    whole = store(items, context)
    with ts.Transaction(atomic=True) as transaction:
        for part in parts:
            store(part, context).experimental_copy_range_to(whole.with_transaction(transaction)).result()


def sweep(items: Path, parts: list[Path]) -> None:
    """Removes data files that the newest version of no store refers to.

    The parts' own trees are kept whole, so that a run that is killed after this can still be resumed.
    """
    kept = {file for directory in (items, *parts) for file in _referenced(directory)}
    for directory in (items, *parts):
        for file in (directory / "d").glob("*"):
            if file not in kept:
                file.unlink(missing_ok=True)


def _referenced(directory: Path) -> set[Path]:
    """The data files that the newest version of the store in `directory` and its tree of versions are made of.

    A commit reads the tree of versions, which begins with the seventeenth, though none of the versions it lists.
    """
    base = ts.KvStore.open(directory_spec(directory)).result()
    manifest = ts.ocdbt.dump(base).result()
    roots = [version["root"] for version in manifest["versions"][-1:]] + manifest["version_tree_nodes"]
    files, pending = set(), [root["location"] for root in roots if "location" in root]
    while pending:
        location = pending.pop()
        files.add(_file_of(location, directory))
        for entry in ts.ocdbt.dump(base, location).result()["entries"]:
            if "indirect_value" in entry:
                files.add(_file_of(entry["indirect_value"], directory))
            elif "location" in entry:
                pending.append(entry["location"])
    return files


def _file_of(location: str, directory: Path) -> Path:
    """The file in `<kind>:<base>:<path>:<offset>:<length>`, as TensorStore writes a location."""
    _, base, path, _, _ = location.split(":")
    return directory / unquote(base) / unquote(path)
