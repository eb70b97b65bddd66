"""A plan: every array to write and the tensors it is made of. Pure data, JSON both ways.

A plan is worked out from headers and a config alone (`mapping.py`), so it can be looked at before a byte moves, and
the same plan is what the engine executes, what a retry compares with, and what is split among workers.
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

FORMAT_VERSION = 2
"""Rises when the same input would be written otherwise than before: a retry across versions starts anew."""


# not pydantic's, which would check each of a hundred thousand as it is made; what JSON says is checked all the same
@dataclasses.dataclass(frozen=True, slots=True)
class SourceSlice:
    """A tensor's place in an array: after the array's ops it fills the region whose lowest corner is `at`.

    begin: where only a part of the tensor is taken, that part's lowest corner; `shape` is then the part's.
    """

    tensor: str
    shape: Shape
    at: tuple[int, ...]
    begin: tuple[int, ...] | None = None

    def in_tensor(self, box: Box) -> Box:
        """A box of the part in the coordinates of the tensor."""
        return box if self.begin is None else shift(box, self.begin)


@dataclass(frozen=True)
class ArrayPlan:
    """One array to write: `sources`, each through `ops`, tile it without gaps or overlaps.

    stored_shape: what the destination calls its shape, where that has axes merged that are apart here: gate and up,
        which one tensor holds interleaved. The elements and their order are the same.
    ops_dtype: what a source is cast to before the ops; their result is cast to `dtype`. None: `dtype`, so that values
        are rounded first and transformed after, as MaxText does.
    source_chunk: the chunks that the sources are stored in, where they are: a chunk is read and decoded as a whole.
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
        return math.prod(self.shape) * itemsize(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunks before compression; those at the edges are stored whole."""
        padded = (-(-extent // step) * step for extent, step in zip(self.shape, self.chunk_shape, strict=True))
        return math.prod(padded) * itemsize(self.dtype)

    def chunks_in(self, box: Box) -> Iterator[tuple[int, ...]]:
        """The indices, in the grid of chunks, of the chunks in a chunk-aligned box."""
        return itertools.product(*self._chunk_ranges(box))

    def count_chunks(self, box: Box) -> int:
        """How many chunks there are in a chunk-aligned box."""
        return math.prod(len(indices) for indices in self._chunk_ranges(box))

    def _chunk_ranges(self, box: Box) -> Iterator[range]:
        spans = zip(box, self.chunk_shape, strict=True)
        return (range(start // step, -(-stop // step)) for (start, stop), step in spans)

    @cached_property
    def _region_shapes(self) -> dict[Shape, Shape]:
        """The shape of a source's region, by the source's."""
        return {shape: chain_shape(self.ops, shape) for shape in {source.shape for source in self.sources}}

    @cached_property
    def _by_corner(self) -> dict[tuple[int, ...], SourceSlice]:
        return {source.at: source for source in self.sources}

    def region(self, source: SourceSlice) -> Box:
        """Where `source` lies in the array."""
        return shift(whole(self._region_shapes[source.shape]), source.at)

    def first_source(self, box: Box) -> SourceSlice:
        """The first of `sources_in`."""
        if len(self._region_shapes) > 1:
            return next(self.sources_in(box))
        spans = zip(box, next(iter(self._region_shapes.values())), strict=True)
        return self._by_corner[tuple([start // step * step for (start, _), step in spans])]

    def sources_in(self, box: Box) -> Iterator[SourceSlice]:
        """The sources whose regions meet `box`."""
        if len(self._region_shapes) > 1:
            return (source for source in self.sources if intersect(box, self.region(source)) is not None)
        # tiles of one shape: their corners are multiples of it
        spans = zip(box, next(iter(self._region_shapes.values())), strict=True)
        corners = itertools.product(*(range(start // step * step, stop, step) for (start, stop), step in spans))
        return (self._by_corner[corner] for corner in corners)


@dataclass(frozen=True)
class Plan:
    """What a run writes. `identity` is what makes two runs the same run, part by part."""

    kind: str
    arrays: tuple[ArrayPlan, ...]
    identity: dict[str, str]
    exact: bool = True
    family: str = ""
    model_name: str = ""
    dropped: tuple[str, ...] = field(default_factory=tuple)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over `full_identity`."""
        return hashlib.sha256(json.dumps(self.full_identity, sort_keys=True).encode()).hexdigest()

    @property
    def full_identity(self) -> dict[str, str]:
        """`identity` and the version of what would be written."""
        return {**self.identity, "format": str(FORMAT_VERSION)}

    @cached_property
    def bytes_out(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def to_json(self) -> bytes:
        return _PLAN.dump_json(self)

    @staticmethod
    def from_json(data: bytes) -> Plan:
        return _PLAN.validate_json(data)


_PLAN = TypeAdapter(Plan)
