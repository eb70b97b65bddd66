"""Atomic writes, locks, work in parallel, and tries again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conversion_lib.core.retry import Backoff, Passing
from conversion_lib.errors import BadInput
from conversion_lib.storage.files import copy_atomically, in_parallel, one_at_a_time, write_atomically, write_first


def test_write_atomically_replaces_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(TypeError):
        write_atomically(path, "three")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize("links", [True, False])
def test_write_first_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Also on a file system without hard links."""

    def no_links(source: Path, destination: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert write_first(tmp_path / "note", b"one")
    assert not write_first(tmp_path / "note", b"two")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("note", b"one")]


def test_write_first_among_many(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def write(index: int) -> bool:
        barrier.wait()
        return write_first(tmp_path / "note", str(index).encode())

    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(write, range(8)))
    assert wrote.count(True) == 1
    assert (tmp_path / "note").read_bytes() == str(wrote.index(True)).encode()


def test_a_copy_appears_whole(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"new")
    (tmp_path / "to").write_bytes(b"old, and longer")
    copy_atomically(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == b"new"
    with pytest.raises(FileNotFoundError):
        copy_atomically(tmp_path / "nowhere", tmp_path / "to")
    assert {path.name for path in tmp_path.iterdir()} == {"from", "to"}
    assert (tmp_path / "to").read_bytes() == b"new"


def test_results_come_in_order() -> None:
    def work(seconds: float, stopped: threading.Event) -> float:
        time.sleep(seconds)
        return seconds

    assert in_parallel(work, [0.05, 0.0, 0.02], threads=3) == [0.05, 0.0, 0.02]
    assert in_parallel(work, [], threads=3) == []


def test_a_failure_ends_what_waits_to_try_again() -> None:
    waiting = threading.Event()
    begun = []

    def fails() -> None:
        waiting.set()
        raise Passing("not yet")

    def work(item: int, stopped: threading.Event) -> None:
        begun.append(item)
        if item == 0:
            Backoff(first_seconds=60).run(fails, stopped=stopped)
        elif item == 1:
            waiting.wait(10)
            raise BadInput("wrong")

    began = time.monotonic()
    with pytest.raises(BadInput, match="wrong"):
        in_parallel(work, range(2), threads=2)
    assert time.monotonic() - began < 5
    with pytest.raises(BadInput):
        in_parallel(work, [1, *range(10, 200)], threads=1)
    assert len(begun) < 20


def test_the_last_failure_is_raised_after_all_tries() -> None:
    tries = []

    def fails() -> None:
        tries.append(1)
        raise Passing(f"try {len(tries)}")

    with pytest.raises(Passing, match="try 4"):
        Backoff(attempts=4, first_seconds=0.001, longest_seconds=0.002).run(fails)
    assert len(tries) == 4


def test_one_at_a_time(tmp_path: Path) -> None:
    lock, inside, most, waits = tmp_path / "sub" / "lock", [0], [0], []

    def hold() -> None:
        with one_at_a_time(lock, lambda: waits.append(1)):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and waits
    assert not lock.exists()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import pathlib, time; from conversion_lib.storage.files import one_at_a_time\n"
        f"with one_at_a_time(pathlib.Path({str(lock)!r}), lambda: None): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
    assert lock.exists()
    with one_at_a_time(lock, lambda: pytest.fail("waited")):
        pass
    assert not lock.exists()
