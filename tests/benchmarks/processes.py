"""Whole processes, measured: wall time, processor time and memory, start-up included."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOUCH = """
import mmap, pathlib
lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
free = next(int(line.split()[1]) for line in lines if line.startswith("MemFree:")) << 10
nbytes = max(1, free - (1 << 30))
memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for offset in range(0, nbytes, mmap.PAGESIZE):
    memory[offset] = 1
"""


@dataclass(frozen=True)
class Measured:
    """One process from its start to its end.

    seconds: wall time. cpu_seconds: user and system time. peak_bytes: largest resident memory, as the kernel has it.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def measure(command: list[Any], environment: dict[str, str] | None = None) -> Measured:
    """Runs `command` to its end. Raises RuntimeError with what it last said where it fails."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=output, stderr=errors, env=os.environ | (environment or {}))
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said, complained = _content(output), _content(errors)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}: {said[-500:]}{complained[-3000:]}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said)


def _content(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def settle(kept: Path, *, cold: bool) -> None:
    """Leaves the machine as every measured process should find it: nothing to write back, the source cached or not,
    free memory at hand.

    kept: of what lies in the directory that it is in, it alone stays in the page cache.
    """
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    else:
        _cache_only(kept)
    _touch_free_memory()


def _cache_only(kept: Path) -> None:
    for path in kept.parent.rglob("*"):
        if path.is_file() and not path.is_relative_to(kept):
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(8 << 20)
    for path in sorted(path for path in kept.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _touch_free_memory() -> None:
    """Takes free memory and lets it go.

    A virtual machine may give what is free for some seconds back to its host; the next to use such a page waits for
    the host, which took three times as long as a page fault by itself. Whoever ran after a pause paid for that.
    In a process of its own: what it was, a child that is started later counts as its own peak.
    """
    subprocess.run([sys.executable, "-c", TOUCH], check=True)
