"""The interface of every source: tensors listed from headers alone, and slices of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from conversion_lib.core.boxes import Box, Shape, size
from conversion_lib.core.dtypes import itemsize

Array = np.ndarray[Any, Any]


class TensorInfo(NamedTuple):
    """A tensor as its header describes it.

    A named tuple, since a large model has a hundred thousand, and a frozen dataclass takes three times as long to make.

    Attributes:
        name: Its name in the source.
        shape: Elements along each axis.
        dtype: A name such as bfloat16.
        file: The file that holds it, for messages.
        order: Its axes from the slowest to the fastest in storage. Empty: in their own order. A range of the slowest
            axes can be read without reading the rest.
    """

    name: str
    shape: Shape
    dtype: str
    file: str = ""
    order: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * itemsize(self.dtype)


class StoredSlice(NamedTuple):
    """A part of a tensor as stored in the files: `box` of `name` (None: all of it), `nbytes` bytes."""

    name: str
    box: Box | None
    nbytes: int

    @classmethod
    def of(cls, info: TensorInfo, box: Box | None) -> StoredSlice:
        """Returns the slice `box` of a stored tensor."""
        return cls(info.name, box, info.nbytes if box is None else size(box) * itemsize(info.dtype))


class Source(Protocol):
    """Lists tensors from headers and reads slices of them. Several threads may read at once."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by name."""
        ...

    def read(self, name: str, box: Box | None = None) -> Array:
        """Reads elements of a tensor.

        Args:
            name: One of `tensors`.
            box: Which elements. None: all.

        Returns:
            An array of the box's shape, in the dtype that `tensors` gives.

        Raises:
            BadInput: The data are damaged, or a value is invalid, such as a scale that is NaN.
            OutsideFailure: Reading failed.
        """
        ...

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        """Returns the stored slices that `read` needs, under their names in storage.

        A source that shows tensors as they are stored returns the slice itself. One that computes tensors from others,
        such as from codes and scales, returns slices of those.
        """
        ...


def stored_bytes(source: Source, name: str, box: Box | None = None) -> int:
    """Returns how many bytes of storage reading `box` (None: all) of a tensor takes."""
    return sum([part.nbytes for part in source.requires(name, box)])
