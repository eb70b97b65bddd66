"""Memory of this process: its peak, the reuse of freed blocks, and how often garbage is collected."""

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
"""glibc's constants for mallopt, from malloc.h."""

LARGE = 1 << 30
SMALL = 4 << 20

ARENAS = 2
"""Few, so that threads reuse blocks freed by others; with one, they wait for each other."""


def peak_bytes() -> int:
    """Returns the largest resident memory of this process so far, in bytes.

    On Linux it is read from /proc: `ru_maxrss` survives exec, so that a subprocess of a large program would report that
    program's size.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    high_water = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(high_water.split()[1]) * 1024


def reuse_freed_memory() -> None:
    """Makes the allocator keep freed blocks for later allocations.

    glibc maps every block of a few MiB anew and unmaps it when it is freed, and the kernel clears each page again. That
    took a third of a conversion's system time, since chunks are encoded into new blocks. Does nothing if the C library
    has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, LARGE)
        mallopt(_M_ARENA_MAX, ARENAS)


class HeapLimit:
    """Returns free pages of the heap to the system if the process holds more than it should.

    `reuse_freed_memory` keeps all freed blocks. With many threads and a few block sizes, that leaves holes which later
    blocks do not fit: over a long conversion the heap grew to twice its peak use.

    Args:
        nbytes: Bytes that may be resident in addition to the current ones.
    """

    def __init__(self, nbytes: int) -> None:
        self._most = _resident_bytes() + nbytes
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def keep(self) -> None:
        """Returns free pages if the limit is exceeded. Call it periodically."""
        if self._trim is not None and _resident_bytes() > self._most:
            self._trim(0)


def _resident_bytes() -> int:
    """Returns this process's resident bytes; 0 if the system does not report them."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def return_freed_memory() -> None:
    """Undoes `reuse_freed_memory`: freed blocks, except small ones, are returned to the system.

    For work with blocks of many sizes: kept blocks that later ones do not fit leave holes, and a check of long prompts
    took a third more than its budget.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, SMALL)
        mallopt(_M_TRIM_THRESHOLD, SMALL)


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code. If that is not 0, it ends without Python's cleanup.

    After a failure, writes may still be in progress, and the cleanup would free what they use: after an error about a
    full disk, a process once ended in a segmentation fault.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if code:
        os._exit(code)
    raise SystemExit(0)


def collect_rarely() -> None:
    """Makes Python collect garbage after a million new objects instead of 700.

    The plan of a large model is half a million objects that stay alive. Scanning them again and again took a sixth of
    the time until the first byte was read.
    """
    gc.set_threshold(1_000_000, 50, 50)
