"""This process's memory: how much it took at most, how what is freed is used again, when garbage is looked for."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""glibc's names of its settings, malloc.h."""

LARGE = 1 << 30
SMALL = 4 << 20

ARENAS = 2
"""Threads share what was freed by others; with one arena they wait for each other."""


def peak_bytes() -> int:
    """The largest resident memory of this process so far.

    Linux's own figure for this address space comes first: `ru_maxrss` outlives exec, so that in a subprocess of a
    large program it tells that program's size.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    high_water = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(high_water.split()[1]) * 1024


def reuse_freed_memory() -> None:
    """Has the allocator keep what is freed for what is allocated next.

    glibc maps every block of some MiB anew and unmaps it when freed; the kernel then clears each page again, a third
    of a conversion's system time, since chunks are encoded into fresh blocks. Where the C library has no such setting,
    nothing changes but the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, LARGE)
        mallopt(_M_ARENA_MAX, ARENAS)


class HeapLimit:
    """Gives free pages of the heap back to the system where the process has come to hold more than it should.

    `reuse_freed_memory` keeps all that is freed, and blocks of a few sizes that many threads take and free leave holes
    that none of the next ones fits: over a long conversion the heap grew to twice what was ever in use.
    """

    def __init__(self, nbytes: int) -> None:
        """nbytes: what may be resident beside what is now."""
        self._most = _resident_bytes() + nbytes
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def keep(self) -> None:
        """Call periodically."""
        if self._trim is not None and _resident_bytes() > self._most:
            self._trim(0)


def _resident_bytes() -> int:
    """What of this process is in memory now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def return_freed_memory() -> None:
    """Undoes `reuse_freed_memory`: what is freed goes back to the system, in all but small blocks.

    For work that takes blocks of many sizes: kept for others that it does not fit, each leaves a hole, and a check of
    long prompts took a third more than its budget.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, SMALL)
        mallopt(_M_TRIM_THRESHOLD, SMALL)


def leave(code: int) -> NoReturn:
    """Ends the process with `code`; where it failed, at once.

    Writes may still be under way then, and Python would take down what they use: with a disk that had run full, a
    process ended in a segmentation fault after it had said so.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if code:
        os._exit(code)
    raise SystemExit(0)


def collect_rarely() -> None:
    """Has Python look for garbage after a million new objects instead of 700.

    The plan of a large model is half a million objects that all stay; looking through them again and again took a
    sixth of the time to the first byte read.
    """
    gc.set_threshold(1_000_000, 50, 50)
