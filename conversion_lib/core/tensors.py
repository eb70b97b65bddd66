"""What every source is: tensors listed from headers alone, and slices of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from conversion_lib.core.boxes import Box, Shape
from conversion_lib.core.dtypes import itemsize

Array = np.ndarray[Any, Any]


class TensorInfo(NamedTuple):
    """A tensor as its header describes it. `file` says where it lies, for messages.

    A tuple, since a large model has a hundred thousand, and a frozen dataclass takes three times as long to make.

    order: its axes from the slowest to the fastest in storage; empty: as they are. A part of the slow ones is read by
    reading that part alone.
    """

    name: str
    shape: Shape
    dtype: str
    file: str = ""
    order: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


class Source(Protocol):
    """Lists tensors from headers and reads slices of them; safe to read from several threads."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, box: Box | None = None) -> Array:
        """The elements of `box` (everything where None), in the dtype that `tensors` gives."""
        ...

    def stored_bytes(self, name: str, box: Box | None = None) -> int:
        """Bytes that reading `box` (everything where None) takes from storage."""
        ...
