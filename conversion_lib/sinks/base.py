"""The interface of sinks, which write boxes of arrays."""

from __future__ import annotations

from typing import Protocol

from conversion_lib.core.boxes import Box
from conversion_lib.core.tensors import Array


class Write(Protocol):
    """A write in progress."""

    def start(self) -> None:
        """Starts to make it durable. A local file may be written before this returns."""
        ...

    def done(self) -> bool:
        """Returns whether the write has ended, well or not. A local file may still have to be synced by `wait`."""
        ...

    def wait(self) -> None:
        """Waits until the write is durable. May be called again.

        Raises:
            OutsideFailure: Writing failed: the disk is full, or the network failed.
            BadInput: A local file may not be written.
        """
        ...


class Sink(Protocol):
    """Writes chunk-aligned boxes of a plan's arrays. Only one thread may call it."""

    def open(self) -> None:
        """Creates the missing files, and keeps the data of an earlier run.

        Raises:
            BadInput: The destination does not allow writing.
            OutsideFailure: The disk is full, or the network failed.
        """
        ...

    def write(self, array: int, box: Box, data: Array) -> Write:
        """Starts to write a box.

        Args:
            array: The index of the array in the plan.
            box: A chunk-aligned box of the array.
            data: The elements, with the box's shape and the array's dtype. They must not change until the write is
                durable.
        """
        ...

    def finish(self) -> None:
        """Completes the output: writes metadata and indices, and removes leftovers of killed runs.

        Raises:
            BadInput: Data that were written before are missing.
            OutsideFailure: Writing failed.
        """
        ...
