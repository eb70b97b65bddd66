"""Buffers for pieces: their total size is limited, and they are reused."""

from __future__ import annotations

import mmap
import threading

import numpy as np

from conversion_lib.core.tensors import Array


class BufferPool:
    """Buffers with a limited total size: acquired before a piece is made, released when the piece is durable.

    Released buffers are reused, because new memory costs a page fault every 4 KiB, which takes as long as the copy into
    it.

    Args:
        total: The limit in bytes. A single buffer may be larger.

    Attributes:
        waited_for: Whether a thread is waiting in `acquire`.
    """

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._idle: list[Array] = []
        self._changed = threading.Condition()
        self._closed = False
        self.waited_for = False

    def acquire(self, nbytes: int) -> Array | None:
        """Waits until there is room, and returns a buffer.

        Args:
            nbytes: Bytes. They always fit if no other buffer is in use, even beyond the limit.

        Returns:
            An array of uint8, whose content is undefined, or None if the pool was closed.
        """
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
        """Returns a buffer to the pool. The caller must not use it afterwards."""
        with self._changed:
            self._used -= buffer.nbytes
            self._idle.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends every `acquire`, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        return self._used == 0 or self._used + nbytes <= self._total


def _mapped(nbytes: int) -> Array:
    """Maps memory that returns to the kernel when it is freed.

    In the heap, buffers of many sizes would leave gaps that do not fit the next buffers.
    """
    # private: shared memory gets no huge pages, and a transposed write touches hundreds of pages at once
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)
