"""The buffers that pieces are made in: never more bytes than a limit, and used again."""

from __future__ import annotations

import mmap
import threading

import numpy as np

from conversion_lib.core.tensors import Array


class BufferPool:
    """Buffers within a limit of bytes: acquired before a piece is made, released when it is durable.

    Released buffers are used again: fresh memory costs a page fault every 4 KiB, as much time as the copy into it.
    """

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._idle: list[Array] = []
        self._changed = threading.Condition()
        self._closed = False
        self.waited_for = False

    def acquire(self, nbytes: int) -> Array | None:
        """Waits until there is room for `nbytes`; one buffer always fits. None once closed."""
        with self._changed:
            self.waited_for = not self._fits(nbytes)
            self._changed.wait_for(lambda: self._closed or self._fits(nbytes))
            self.waited_for = False
            self._used += nbytes
            if self._closed:
                return None
            same = next((index for index, buffer in enumerate(self._idle) if buffer.nbytes == nbytes), None)
            if same is not None:
                return self._idle.pop(same)
            while self._idle and self._used + sum(buffer.nbytes for buffer in self._idle) > self._total:
                self._idle.pop(0)
        return _mapped(nbytes)

    def release(self, buffer: Array) -> None:
        """Gives a buffer back, to be used again."""
        with self._changed:
            self._used -= buffer.nbytes
            self._idle.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        return self._used == 0 or self._used + nbytes <= self._total


def _mapped(nbytes: int) -> Array:
    """Memory of its own, which goes back to the kernel when it is released: in the heap, buffers of many sizes would
    leave gaps that none of the next ones fits."""
    # private: the kernel gives shared memory no huge pages, and a transposed write touches hundreds of pages at once
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)
