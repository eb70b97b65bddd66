"""A checkpoint whose headers lie in a directory here and whose weights lie elsewhere."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from conversion_lib.core.tensors import Source
from conversion_lib.plan.pace import Pace
from conversion_lib.sources.safetensors import MAX_HEADER, SafetensorsSource

FIRST_BYTES = 128 << 10
"""Asked of each weight file at once: more than nearly every header has, so that one request is enough."""


class Remote(Protocol):
    """Where the weights are: on the Hub, or in a bucket."""

    @property
    def name(self) -> str:
        """What a person calls the checkpoint, such as its repository and commit."""
        ...

    def open(self) -> SafetensorsSource:
        """The source whose headers are here."""
        ...

    def pace(self, stored: SafetensorsSource, shown: Source) -> Pace | None:
        """What is to be told of the pieces made from `stored`, which the plan reads as `shown`; None: nothing."""
        ...


def write_header(path: Path, size: int, first_bytes: Callable[[int], bytes]) -> None:
    """Makes of `path` a safetensors file of `size` bytes with its header and zeros for tensors, in a sparse file.

    first_bytes: gives so many bytes of the true file from its beginning. A header that cannot be right is left to
    SafetensorsSource to refuse.
    """
    with path.open("wb") as stream:
        stream.truncate(size)
        if size < 8:
            return
        start = first_bytes(min(FIRST_BYTES, size))
        length: int = 8 + struct.unpack("<Q", start[:8])[0]
        if len(start) < length <= min(8 + MAX_HEADER, size):
            start = first_bytes(length)
        stream.write(start[:length])
