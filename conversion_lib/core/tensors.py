"""What every source is: tensors listed from headers alone, and slices of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from conversion_lib.core.boxes import Box, Shape, size
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


class StoredSlice(NamedTuple):
    """A part of a tensor as the files hold it: `box` of `name`, everything where None, of `nbytes` bytes."""

    name: str
    box: Box | None
    nbytes: int

    @classmethod
    def of(cls, info: TensorInfo, box: Box | None) -> StoredSlice:
        """The slice `box` of a tensor that is stored as `info` says."""
        return cls(info.name, box, info.nbytes if box is None else size(box) * itemsize(info.dtype))


class Source(Protocol):
    """Lists tensors from headers and reads slices of them; safe to read from several threads."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, box: Box | None = None) -> Array:
        """The elements of `box` (everything where None), in the dtype that `tensors` gives."""
        ...

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        """What reading `box` (everything where None) takes of the tensors that are stored, under their own names.

        A source that shows tensors as they are stored names the slice itself; one that makes them of others, such as
        of codes and scales, names those.
        """
        ...


def stored_bytes(source: Source, name: str, box: Box | None = None) -> int:
    """Bytes that reading `box` (everything where None) takes from storage."""
    return sum([part.nbytes for part in source.requires(name, box)])
