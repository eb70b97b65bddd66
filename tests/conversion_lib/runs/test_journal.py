"""The journal: what was committed is known again, whatever the size of the pieces; a torn line is left out."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from conversion_lib.plan.pieces import Piece
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.runs.journal import Journal
from conversion_lib.storage.logs import FileLog


def plan() -> Plan:
    array = ArrayPlan("a/b", (8, 6), "float32", (2, 3), (), (SourceSlice("t", (8, 6), (0, 0)),))
    return Plan(kind="maxtext", arrays=(array,), identity={})


def opened(path: Path) -> Journal:
    return Journal(FileLog(path), plan()).open()


def test_committed_pieces_are_known_by_the_next_run(tmp_path):
    journal = opened(tmp_path / "journal")
    journal.add([Piece(0, ((0, 4), (0, 6)))])
    journal.close()
    again = opened(tmp_path / "journal")
    assert again.has(Piece(0, ((0, 4), (0, 6))))
    assert again.has(Piece(0, ((2, 4), (3, 6))))  # smaller pieces, as under a smaller budget
    assert not again.has(Piece(0, ((0, 8), (0, 6))))
    assert not again.has(Piece(0, ((4, 6), (0, 3))))


def test_chunks_of_several_groups_add_up(tmp_path):
    journal = opened(tmp_path / "journal")
    for start in range(0, 8, 2):
        journal.add([Piece(0, ((start, start + 2), (0, 6)))])
    journal.close()
    assert opened(tmp_path / "journal").has(Piece(0, ((0, 8), (0, 6))))


def test_a_line_cut_short_by_a_kill_does_not_count(tmp_path):
    path = tmp_path / "journal"
    journal = opened(path)
    journal.add([Piece(0, ((0, 2), (0, 6)))])
    journal.add([Piece(0, ((2, 4), (0, 6)))])
    journal.close()
    path.write_bytes(path.read_bytes()[:-5])
    again = opened(path)
    assert again.has(Piece(0, ((0, 2), (0, 6))))
    assert not again.has(Piece(0, ((2, 4), (0, 6))))
    again.add([Piece(0, ((4, 6), (0, 6)))])
    again.close()
    assert opened(path).has(Piece(0, ((4, 6), (0, 6))))


def test_on_a_full_disk_the_reserve_makes_room(tmp_path, monkeypatch):
    journal = opened(tmp_path / "journal")
    write, refused = os.write, []

    def full_while_reserved(fd, data):
        if (tmp_path / "journal.reserve").exists():
            refused.append(write(fd, data[:5]))  # a part of the line gets in
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full_while_reserved)
    journal.add([Piece(0, ((0, 2), (0, 6)))])
    monkeypatch.undo()
    journal.close()
    assert refused == [5]
    again = opened(tmp_path / "journal")
    assert again.has(Piece(0, ((0, 2), (0, 6))))
    assert (tmp_path / "journal.reserve").exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"pieces": [["a/b", [[0, 10**12], [0, 6]]]]}),
        json.dumps({"pieces": [["a/b", [[0, 10**12], [0, 10**12]]]]}),
        json.dumps({"pieces": [["a/b", [[-(10**12), 8], [0, 6]]]]}),
        json.dumps({"pieces": [["a/b", [[0, True], [0, 6]]]]}),
        json.dumps({"pieces": [["a/b", [[0, 8.0], [0, 6]]]]}),
        json.dumps({"pieces": [["a/b", [[0, 8]]]]}),
        json.dumps({"pieces": [["a/b", [[0, 8], [0, 6]]]] * 1000}),  # each chunk a thousand times
        json.dumps({"pieces": [["a/b", {"0": 1}]]}),
        json.dumps({"pieces": [["b", [[0, 8], [0, 6]]]]}),
        json.dumps({"pieces": 5}),
        json.dumps([1]),
        '{"pieces": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"pieces": [["a/b", [[0, ' + "9" * 5000 + "], [0, 6]]]]}",
        "\xff",
    ],
)
def test_a_line_that_the_plan_does_not_have_is_damaged(tmp_path, line):
    good = json.dumps({"pieces": [["a/b", [[0, 2], [0, 3]]]]})
    (tmp_path / "journal").write_bytes(f"{good}\n{line}\n".encode("latin-1"))
    journal = opened(tmp_path / "journal")
    assert journal.count == 1
    assert (tmp_path / "journal").read_text() == f"{good}\n"
    journal.close()
