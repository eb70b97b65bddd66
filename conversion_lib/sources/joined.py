"""Joins tensors that a checkpoint stores separately and MaxText as one array: their rows in MaxText's order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from conversion_lib.core.boxes import Box, whole
from conversion_lib.core.tensors import Array, Source, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput

Dims = Mapping[str, int]
"""The sizes and flags of one model, by the names that its family's rules use."""


@dataclass(frozen=True)
class Join:
    """Tensors of a layer whose rows MaxText stores in one array. Rules use them under one name.

    Attributes:
        name: The joined tensor's name after `model.layers.<i>.`.
        parts: The names of the stored tensors after `model.layers.<i>.`.
        rows: Returns, for given dims, the runs of rows from top to bottom: the index of the part, the first row, and
            the row after the last.
    """

    name: str
    parts: tuple[str, ...]
    rows: Callable[[Dims], Sequence[tuple[int, int, int]]]


def joined(source: Source, joins: Sequence[Join], dims: Dims) -> Source:
    """Shows a source with the tensors of `joins` joined.

    Returns:
        `source` itself if it has no tensors to join.

    Raises:
        BadInput: A part of a joined tensor is missing, or its shape or dtype does not fit the others.
    """
    tensors: dict[str, TensorInfo] = {}
    made: dict[str, _Joined] = {}
    companions: set[str] = set()
    for name, info in source.tensors.items():
        join = next((join for join in joins if name.endswith("." + join.parts[0])), None)
        if join is None:
            tensors[name] = info
            continue
        before = name.removesuffix(join.parts[0])
        result = _Joined.of([_found(source, before + part, name) for part in join.parts], join.rows(dims))
        made[before + join.name] = result
        tensors[before + join.name] = TensorInfo(before + join.name, result.shape, info.dtype, info.file)
        companions.update(before + part for part in join.parts)
    if not made:
        return source
    return JoinedSource(source, {name: info for name, info in tensors.items() if name not in companions}, made)


def _found(source: Source, name: str, companion: str) -> TensorInfo:
    info = source.tensors.get(name)
    if info is None:
        raise BadInput(f"tensor {name} is missing: MaxText stores it in one array with {companion}")
    return info


@dataclass(frozen=True)
class _Joined:
    """`runs`: (tensor, first row, row after the last) from top to bottom; `ends`: the row after each in the result."""

    runs: tuple[tuple[str, int, int], ...]
    ends: tuple[int, ...]
    columns: int

    @staticmethod
    def of(parts: Sequence[TensorInfo], rows: Sequence[tuple[int, int, int]]) -> _Joined:
        """Raises BadInput if a part has an unexpected number of rows, or other columns or dtype than the first."""
        for number, info in enumerate(parts):
            wanted = sum(stop - start for part, start, stop in rows if part == number)
            if (*info.shape[1:], info.dtype) != (*parts[0].shape[1:], parts[0].dtype) or info.shape[0] != wanted:
                raise BadInput(
                    f"{info.file}: tensor {info.name} is {info.dtype} {list(info.shape)}, expected {parts[0].dtype} "
                    f"{[wanted, *parts[0].shape[1:]]}: MaxText stores it in one array with {parts[0].name}"
                )
        return _Joined(
            tuple((parts[part].name, start, stop) for part, start, stop in rows),
            tuple(accumulate(stop - start for _, start, stop in rows)),
            parts[0].shape[1],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.ends[-1], self.columns

    def within(self, box: Box) -> Iterator[tuple[str, Box]]:
        """Yields each part to read and the box to read of it, from top to bottom."""
        (first, last), columns = box
        for place in range(bisect_right(self.ends, first), len(self.runs)):
            name, start, stop = self.runs[place]
            offset = start - (self.ends[place] - (stop - start))
            if first + offset >= stop or last + offset <= start:
                return
            yield name, ((max(first + offset, start), min(last + offset, stop)), columns)


class JoinedSource:
    """A source in which some tensors are joined from rows of stored ones."""

    def __init__(self, source: Source, tensors: Mapping[str, TensorInfo], made: Mapping[str, _Joined]) -> None:
        self._source, self.tensors, self._made = source, tensors, made

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        if name not in self._made:
            return self._source.requires(name, box)
        parts = self._made[name].within(box or whole(self.tensors[name].shape))
        return [stored for part, rows in parts for stored in self._source.requires(part, rows)]

    def read(self, name: str, box: Box | None = None) -> Array:
        if name not in self._made:
            return self._source.read(name, box)
        parts = self._made[name].within(box or whole(self.tensors[name].shape))
        return np.concatenate([self._source.read(part, rows) for part, rows in parts])
