"""A plan: every array to write, and the tensors that it is made from. Pure data, with conversion to and from JSON.

A plan is made from headers and a config alone (see `conversion_lib.mapping`), so it can be shown before any data move.
The engine executes the same plan, a retry compares it, and workers split it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import field
from functools import cached_property

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from conversion_lib.core.boxes import Box, Shape, intersect, shift, whole
from conversion_lib.core.dtypes import itemsize
from conversion_lib.plan.ops import Ops, chain_shape

FORMAT_VERSION = 3
"""Increased when the output for the same input changes: then a retry with a newer version starts again."""


# not pydantic's: that would check each of a hundred thousand instances; JSON is checked anyway
@dataclasses.dataclass(frozen=True, slots=True)
class SourceSlice:
    """A tensor, or a box of it, that fills a region of an array after the array's ops.

    Attributes:
        tensor: The tensor's name in the source.
        shape: The shape that is read.
        at: The lowest corner of the region in the array.
        begin: The lowest corner of the box in the tensor; None if the whole tensor is used.
    """

    tensor: str
    shape: Shape
    at: tuple[int, ...]
    begin: tuple[int, ...] | None = None

    def in_tensor(self, box: Box) -> Box:
        """Converts a box from the coordinates of what is read to those of the tensor."""
        return box if self.begin is None else shift(box, self.begin)


@dataclass(frozen=True)
class ArrayPlan:
    """One array to write. Its `sources`, each after `ops`, fill it without gaps or overlaps.

    Attributes:
        path: The array's path in the output.
        shape: Elements along each axis.
        dtype: A name such as bfloat16.
        chunk_shape: Elements of a chunk along each axis; of safetensors, the unit of writing.
        stored_shape: The shape in the output if it merges axes that are separate here, such as for interleaved gate and
            up. The elements and their order are the same. None: `shape`.
        ops_dtype: The dtype that a source is cast to before the ops; their result is cast to `dtype`. None: `dtype`, so
            values are rounded first and then transformed, as MaxText does.
        source_chunk: The chunk shape of the stored sources. A chunk is read and decoded as a whole. None if they have
            no chunks.
    """

    path: str
    shape: Shape
    dtype: str
    chunk_shape: Shape
    ops: Ops
    sources: tuple[SourceSlice, ...]
    stored_shape: Shape | None = None
    ops_dtype: str | None = None
    source_chunk: Shape | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * itemsize(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunks before compression. Chunks at the edges are stored whole."""
        padded = (-(-extent // step) * step for extent, step in zip(self.shape, self.chunk_shape, strict=True))
        return math.prod(padded) * itemsize(self.dtype)

    def chunks_in(self, box: Box) -> Iterator[tuple[int, ...]]:
        """Yields the grid indices of the chunks in a chunk-aligned box."""
        return itertools.product(*self._chunk_ranges(box))

    def count_chunks(self, box: Box) -> int:
        """Returns the number of chunks in a chunk-aligned box."""
        return math.prod(len(indices) for indices in self._chunk_ranges(box))

    def _chunk_ranges(self, box: Box) -> Iterator[range]:
        spans = zip(box, self.chunk_shape, strict=True)
        return (range(start // step, -(-stop // step)) for (start, stop), step in spans)

    @cached_property
    def _region_shapes(self) -> dict[Shape, Shape]:
        """The shape of a source's region, by the shape of the source."""
        return {shape: chain_shape(self.ops, shape) for shape in {source.shape for source in self.sources}}

    @cached_property
    def _by_corner(self) -> dict[tuple[int, ...], SourceSlice]:
        return {source.at: source for source in self.sources}

    def region(self, source: SourceSlice) -> Box:
        """Returns the box of the array that `source` fills."""
        return shift(whole(self._region_shapes[source.shape]), source.at)

    def first_source(self, box: Box) -> SourceSlice:
        """Returns the first of `sources_in`."""
        if len(self._region_shapes) > 1:
            return next(self.sources_in(box))
        spans = zip(box, next(iter(self._region_shapes.values())), strict=True)
        return self._by_corner[tuple([start // step * step for (start, _), step in spans])]

    def sources_in(self, box: Box) -> Iterator[SourceSlice]:
        """Yields the sources whose regions overlap `box`."""
        if len(self._region_shapes) > 1:
            return (source for source in self.sources if intersect(box, self.region(source)) is not None)
        # all tiles have one shape: their corners are multiples of it
        spans = zip(box, next(iter(self._region_shapes.values())), strict=True)
        corners = itertools.product(*(range(start // step * step, stop, step) for (start, stop), step in spans))
        return (self._by_corner[corner] for corner in corners)


@dataclass(frozen=True)
class Plan:
    """Everything that a run writes.

    Attributes:
        kind: `maxtext` or `safetensors`.
        identity: What makes two runs the same run, such as the source's content and the target.
        exact: Whether the inverse conversion gives back the source's bits.
        family: The family's name.
        model_name: The model's name in the record.
        dropped: A line for each kind of tensor that is left out, or whose size or dtype changes.
    """

    kind: str
    arrays: tuple[ArrayPlan, ...]
    identity: dict[str, str]
    exact: bool = True
    family: str = ""
    model_name: str = ""
    dropped: tuple[str, ...] = field(default_factory=tuple)

    @property
    def fingerprint(self) -> str:
        """The hexadecimal SHA-256 of `full_identity`."""
        return hashlib.sha256(json.dumps(self.full_identity, sort_keys=True).encode()).hexdigest()

    @property
    def full_identity(self) -> dict[str, str]:
        """`identity` and the version of the output format."""
        return {**self.identity, "format": str(FORMAT_VERSION)}

    @cached_property
    def bytes_out(self) -> int:
        """Bytes of all arrays, without padding and before compression."""
        return sum(array.nbytes for array in self.arrays)

    def to_json(self) -> bytes:
        """Returns the plan as JSON for `from_json`."""
        return _PLAN.dump_json(self)

    @staticmethod
    def from_json(data: bytes) -> Plan:
        """Reads the output of `to_json`. Raises pydantic's ValidationError for anything else."""
        return _PLAN.validate_json(data)


_PLAN = TypeAdapter(Plan)
