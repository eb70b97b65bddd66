"""Merging stores by reference, and sweeping what is dead in them, on trees of several levels."""

from __future__ import annotations

import pytest
import tensorstore as ts

from conversion_lib.sinks import ocdbt
from conversion_lib.storage.local import LocalLocation

FOLDERS = ["ocdbt.process_0", "ocdbt.process_1"]


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Two stores of 150 values each, written in 30 commits, with nodes so small that the trees have levels."""
    monkeypatch.setattr(ocdbt, "CONFIG", {"max_inline_value_bytes": 100, "max_decoded_node_bytes": 2000})
    context = ts.Context()
    directories = [tmp_path / folder for folder in FOLDERS]
    for number, directory in enumerate(directories):
        store = ocdbt.store(LocalLocation(directory), context)
        for commit in range(30):
            for future in [store.write(f"{number}/{commit:03d}/{i}", bytes([commit]) * 500) for i in range(5)]:
                future.result()
    return tmp_path, directories, context


def values(directory) -> dict[bytes, bytes]:
    store = ocdbt.store(LocalLocation(directory), ts.Context())
    return {key: store.read(key).result().value for key in store.list().result()}


def bytes_in(directories) -> int:
    return sum(file.stat().st_size for directory in directories for file in (directory / "d").glob("*"))


def test_a_merged_store_has_what_its_parts_have(parts):
    items, directories, context = parts
    ocdbt.merge(LocalLocation(items), FOLDERS, context)
    everything = values(items)
    assert len(everything) == 300
    assert all(value == bytes([int(key.split(b"/")[1])]) * 500 for key, value in everything.items())
    assert bytes_in([items]) < 0.1 * bytes_in(directories)  # no data moved


def test_a_sweep_removes_what_is_dead_and_nothing_else(parts):
    items, directories, context = parts
    # whether the nodes of an older tree have a file of their own depends on timing; values that are replaced have one
    store = ocdbt.store(LocalLocation(directories[0]), context)
    for future in [store.write(f"0/000/{i}", bytes(500)) for i in range(5)]:
        future.result()
    ocdbt.merge(LocalLocation(items), FOLDERS, context)
    before = values(items)
    size = bytes_in(directories)
    (directories[0] / "d" / "left-by-a-kill").write_bytes(bytes(10_000))
    ocdbt.sweep(LocalLocation(items), FOLDERS, context)
    assert not (directories[0] / "d" / "left-by-a-kill").exists()
    assert bytes_in(directories) < size
    assert values(items) == before
    # a run that is killed now still finds its parts whole
    assert {**values(directories[0]), **values(directories[1])} == before


def test_a_swept_store_takes_further_commits(parts):
    """A commit reads the tree of versions: a run that is killed after the sweep goes on writing."""
    items, directories, context = parts
    ocdbt.merge(LocalLocation(items), FOLDERS, context)
    before = values(directories[0])
    ocdbt.sweep(LocalLocation(items), FOLDERS, context)
    store = ocdbt.store(LocalLocation(directories[0]), ts.Context())
    for number in range(300):
        store.write(f"more/{number}", b"x").result()
    assert values(directories[0]) == before | {f"more/{number}".encode(): b"x" for number in range(300)}
