"""Ends a command that takes far more memory than it should, before the system does.

A few megabytes of a compressed chunk can decode to any size, and TensorStore decodes a chunk as a whole before it
compares the size. So the process is watched while it reads chunks, and ended with an error line when it takes more than
any correct input needs.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion_lib.errors import BadInput, FerryError

POLL_SECONDS = 0.02
SLACK_BYTES = 1 << 30
"""For whatever an estimate does not know of: libraries that are loaded meanwhile, freed memory that is kept."""

_leave: Callable[[FerryError], None] | None = None


def ends_process_by(leave: Callable[[FerryError], None] | None) -> None:
    """Sets what reports an error and ends the process at once, from any thread.

    Args:
        leave: The function. None: nothing is watched, as in a program that only uses the library.
    """
    global _leave
    _leave = leave


@contextmanager
def memory_bound(nbytes: int, what: str) -> Iterator[None]:
    """Ends the process if it takes more memory within the block than it should.

    Args:
        nbytes: Bytes that the block is expected to need at most. Twice as much and SLACK_BYTES are allowed.
        what: What is read, for the message.
    """
    leave, most = _leave, _anonymous_bytes() + 2 * nbytes + SLACK_BYTES
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            if leave is not None and _anonymous_bytes() > most:
                leave(
                    BadInput(
                        f"{what}: reading it takes more than {most} bytes of memory, expected {nbytes}: a chunk "
                        "decodes to more than its metadata say, or --memory-budget is too small for this checkpoint"
                    )
                )

    if leave is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _anonymous_bytes() -> int:
    """Memory of this process that is no file's; 0 if the system does not tell."""
    try:
        resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * resource.getpagesize()
