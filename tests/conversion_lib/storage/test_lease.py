"""Leases in directories and in buckets: one holder at a time, and what another machine may see of it."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conversion_lib.errors import OutsideFailure
from conversion_lib.storage import lease as module
from conversion_lib.storage.lease import FileLease, Note, State


def test_one_holds_it(tmp_path: Path) -> None:
    first, second = (FileLease(tmp_path / "work" / "lease") for _ in range(2))
    assert first.acquire() and not second.acquire()
    assert first.held and second.look() is State.HELD
    assert str(first.read()).startswith(f"process {os.getpid()} on ")
    first.release()
    assert not list((tmp_path / "work").iterdir())
    assert second.acquire()
    second.release()


def test_one_of_another_machine_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPIRED_SECONDS", 0.2)
    path = tmp_path / "lease"
    note = note_of_a_past_holder(path).model_copy(update={"machine": "another"})
    path.write_text(note.model_dump_json())
    watcher = FileLease(path)
    assert not watcher.acquire(), "its lock may not be seen here"
    time.sleep(0.1)
    path.write_text(note.model_copy(update={"heartbeat": 1}).model_dump_json())
    assert watcher.look() is State.HELD
    time.sleep(0.15)
    assert not watcher.acquire(), "it was renewed"
    time.sleep(0.25)
    assert watcher.acquire()
    watcher.release()


def note_of_a_past_holder(path: Path) -> Note:
    lease = FileLease(path)
    assert lease.acquire()
    note = lease.read()
    lease.release()
    assert note is not None
    return note


def test_a_holder_notices_that_it_was_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    lost = threading.Event()
    lease = FileLease(tmp_path / "lease", lost.set)
    assert lease.acquire()
    note = lease.read()
    assert note is not None and not lost.wait(0.2)
    (tmp_path / "lease").unlink()
    (tmp_path / "lease").write_text(note.model_copy(update={"id": "another"}).model_dump_json())
    assert lost.wait(5)
    with pytest.raises(OutsideFailure, match="another run took over here"):
        lease.require("here")
    lease.release()
    assert (tmp_path / "lease").exists(), "another's lease stays"


def test_where_there_are_no_locks_one_of_several_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("conversion_lib.storage.lease.fcntl.flock", no_locks)
    monkeypatch.setattr(module, "SETTLING_SECONDS", 0.3)
    leases = [FileLease(tmp_path / "lease") for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda lease: lease.acquire(), leases))
    assert taken.count(True) == 1
    holder = leases[taken.index(True)]
    late = FileLease(tmp_path / "lease")
    assert not late.acquire()
    holder.release()
    assert late.acquire()
    late.release()


def test_another_mount_is_as_another_machine(tmp_path: Path) -> None:
    """Two containers on one machine may each have a mount of their own, and do not see each other's locks then."""
    path = tmp_path / "lease"
    note = note_of_a_past_holder(path)
    assert note.machine.endswith(f" {tmp_path.stat().st_dev}")
    kernel = note.machine.split()[0]
    path.write_text(note.model_copy(update={"machine": f"{kernel} 1"}).model_dump_json())
    assert not FileLease(path).acquire()
    path.write_text(note.model_dump_json())
    mine = FileLease(path)
    assert mine.acquire(), "whoever held it here is dead, or its lock would not be free"
    mine.release()


def test_a_failure_stays_for_those_that_wait(tmp_path: Path) -> None:
    failing, waiting = (FileLease(tmp_path / "lease") for _ in range(2))
    assert failing.acquire()
    failing.release(failure="the disk was full", final=True)
    note = waiting.read()
    assert note is not None and (note.failure, note.failure_is_final) == ("the disk was full", True)
    assert waiting.look() is State.FREE and waiting.acquire()
    note = waiting.read()
    assert note is not None and note.failure is None
    waiting.release()


def test_looks_are_in_nobody_s_way(tmp_path: Path) -> None:
    """Several look at a dead holder's lease while one takes it."""
    path = tmp_path / "lease"
    note = note_of_a_past_holder(path)
    for _ in range(20):
        path.write_text(note.model_dump_json())
        with ThreadPoolExecutor(6) as threads:
            looks = [threads.submit(FileLease(path).look) for _ in range(5)]
            taker = FileLease(path)
            assert threads.submit(taker.acquire).result()
            assert {look.result() for look in looks} <= {State.FREE, State.HELD}
        taker.release()
