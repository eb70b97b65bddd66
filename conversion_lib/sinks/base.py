"""What every sink is: something that takes boxes of arrays, and commits them all at once."""

from __future__ import annotations

from typing import Protocol

from conversion_lib.core.boxes import Box
from conversion_lib.core.tensors import Array


class Write(Protocol):
    """A write under way."""

    def start(self) -> None:
        """Begins to make it durable, without waiting."""
        ...

    def done(self) -> bool:
        """Whether `wait` would return at once, or raise."""
        ...

    def wait(self) -> None:
        """Returns when it is durable. Raises OutsideFailure where that failed (disk full, network)."""
        ...


class Sink(Protocol):
    """Takes chunk-aligned boxes of the plan's arrays. One thread writes."""

    def open(self) -> None:
        """Creates what is not there yet; keeps what an earlier run wrote."""
        ...

    def write(self, array: int, box: Box, data: Array) -> Write:
        """Begins to write `data`, which must not change until the write is durable."""
        ...

    def finish(self) -> None:
        """Makes a whole of what was written: metadata, indices, nothing left behind by kills."""
        ...
