"""A claim, by the file alone: what another machine may see of it."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conversion_lib.on_the_fly.claim import Claim


def test_one_holds_it(tmp_path: Path) -> None:
    first, second = (Claim(tmp_path / "work" / "claim", lambda: None) for _ in range(2))
    assert first.take() and not second.take()
    assert str(first.read()).startswith(f"process {os.getpid()} on ")
    first.release()
    assert not (tmp_path / "work").exists()
    assert second.take()
    second.release()


def test_one_of_another_machine_is_left_when_it_stands_still(tmp_path: Path) -> None:
    path = tmp_path / "work" / "claim"
    elsewhere = Claim(path, lambda: None)
    assert elsewhere.take()
    note = elsewhere.read()
    assert note is not None
    elsewhere.release()
    path.parent.mkdir()
    path.write_text(note.model_copy(update={"machine": "another"}).model_dump_json())
    watcher = Claim(path, lambda: None, stale_seconds=0.2)
    assert not watcher.take(), "its lock may not be seen here"
    time.sleep(0.1)
    path.write_text(note.model_copy(update={"machine": "another", "beat": 1}).model_dump_json())
    assert not watcher.take()
    time.sleep(0.15)
    assert not watcher.take(), "it was renewed"
    time.sleep(0.25)
    assert watcher.take()
    watcher.release()


def test_a_holder_notices_that_it_was_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion_lib.on_the_fly.claim.BEAT_SECONDS", 0.05)
    lost = threading.Event()
    claim = Claim(tmp_path / "claim", lost.set)
    assert claim.take()
    note = claim.read()
    assert note is not None and not lost.wait(0.2)
    (tmp_path / "claim").unlink()
    (tmp_path / "claim").write_text(note.model_copy(update={"id": "another"}).model_dump_json())
    assert lost.wait(5)
    claim.release()
    assert (tmp_path / "claim").exists(), "another's claim stays"


def test_where_there_are_no_locks_one_of_several_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("conversion_lib.on_the_fly.claim.fcntl.flock", no_locks)
    monkeypatch.setattr("conversion_lib.on_the_fly.claim.SETTLING_SECONDS", 0.3)
    claims = [Claim(tmp_path / "claim", lambda: None, stale_seconds=60) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda claim: claim.take(), claims))
    assert taken.count(True) == 1
    holder = claims[taken.index(True)]
    late = Claim(tmp_path / "claim", lambda: None, stale_seconds=60)
    assert not late.take()
    holder.release()
    assert late.take()
    late.release()


def test_another_mount_is_as_another_machine(tmp_path: Path) -> None:
    """Two containers on one machine may each have a mount of their own, and do not see each other's locks then."""
    path = tmp_path / "work" / "claim"
    claim = Claim(path, lambda: None)
    assert claim.take()
    note = claim.read()
    assert note is not None and note.machine.endswith(f" {tmp_path.stat().st_dev}")
    claim.release()
    path.parent.mkdir()
    kernel = note.machine.split()[0]
    path.write_text(note.model_copy(update={"machine": f"{kernel} 1"}).model_dump_json())
    assert not Claim(path, lambda: None).take()
    path.write_text(note.model_dump_json())
    mine = Claim(path, lambda: None)
    assert mine.take(), "whoever held it here is dead, or its lock would not be free"
    mine.release()
