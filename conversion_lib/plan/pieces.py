"""Cuts a plan into pieces, the units of work, and a piece into bands, the units of reading.

A piece is a box of whole chunks of one array, so writing it twice is harmless. It is one chunk, or as many as are
needed to read its sources in long runs: a chunk of a transposed array needs some columns of every row of its source. A
band is the part of one source that is read and transformed at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from conversion_lib.core.boxes import Box, Shape, box_shape, intersect, relative_to, shift, size, whole
from conversion_lib.core.dtypes import itemsize
from conversion_lib.core.tensors import TensorInfo
from conversion_lib.plan.ops import pull_chain
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice

LONG_RUN = 256 << 10
"""Contiguous bytes of a source. Longer runs are not read faster."""


class Piece(NamedTuple):
    """A chunk-aligned box of the array `plan.arrays[array]`."""

    array: int
    box: Box


class Band(NamedTuple):
    """A part of one source that is read at once.

    Attributes:
        read: The box to read of the source's tensor.
        result: The same part in the coordinates of the ops' output.
        write: The same part in the coordinates of the array.
    """

    source: SourceSlice
    read: Box
    result: Box
    write: Box


def whole_arrays(plan: Plan) -> list[Piece]:
    """Returns every array as one piece."""
    return [Piece(number, whole(array.shape)) for number, array in enumerate(plan.arrays)]


def cut(plan: Plan, share: Iterable[Piece], limit: int) -> list[Piece]:
    """Cuts pieces into smaller ones.

    Args:
        plan: The plan that the pieces are of.
        share: The pieces to cut.
        limit: The most bytes of a piece, unless one chunk is larger.
    """
    shapes: dict[int, Shape] = {}
    pieces = []
    for large in share:
        if (shape := shapes.get(large.array)) is None:
            shape = shapes[large.array] = piece_shape(plan.arrays[large.array], limit)
        steps = [range(start, stop, step) for (start, stop), step in zip(large.box, shape, strict=True)]
        for corner in itertools.product(*steps):
            spans = zip(corner, shape, large.box, strict=True)
            pieces.append(Piece(large.array, tuple([(at, min(at + step, stop)) for at, step, (_, stop) in spans])))
    return pieces


def source_order(plan: Plan, tensors: Iterable[str]) -> Callable[[Piece], tuple[int, Shape, int]]:
    """Returns a sort key for pieces, so that a source is read from front to back.

    If the source is stored in chunks, pieces that read the same chunk are neighbours.

    Args:
        plan: The plan that the pieces are of.
        tensors: The names of the source's tensors, in the order of its files.
    """
    order = {name: index for index, name in enumerate(tensors)}

    def key(piece: Piece) -> tuple[int, Shape, int]:
        array = plan.arrays[piece.array]
        first = array.first_source(piece.box)
        return order[first.tensor], _chunk_read_first(array, first, piece.box), piece.array

    return key


def _chunk_read_first(array: ArrayPlan, source: SourceSlice, box: Box) -> Shape:
    """Returns the grid index of the first chunk of `source` that a piece with the given box reads."""
    if array.source_chunk is None:
        return ()
    shared = intersect(box, array.region(source))
    if shared is None:
        return ()
    result = relative_to(shared, array.region(source))
    read = source.in_tensor(pull_chain(array.ops, result, source.shape))
    return tuple(start // step for (start, _), step in zip(read, array.source_chunk, strict=True))


def piece_shape(array: ArrayPlan, limit: int) -> Shape:
    """Returns the shape of a piece: one chunk, or more chunks if that makes the runs of the source longer.

    The shape is doubled along the axis that lengthens the runs most, while it fits `limit` bytes. A source that is
    itself stored in chunks has no runs.
    """
    if array.source_chunk is not None:
        return array.chunk_shape
    shape, best = array.chunk_shape, _run_bytes(array, array.chunk_shape)
    width = itemsize(array.dtype)
    while best < LONG_RUN:
        grown = []
        for axis, (step, extent) in enumerate(zip(shape, array.shape, strict=True)):
            wider = (*shape[:axis], min(step * 2, extent), *shape[axis + 1 :])
            if step < extent and math.prod(wider) * width <= limit:
                grown.append((_run_bytes(array, wider), wider))
        run, wider = max(grown, default=(0, shape))
        if run <= best:
            break
        shape, best = wider, run
    return shape


def _run_bytes(array: ArrayPlan, shape: Shape) -> int:
    """Returns the bytes of one contiguous run in what a piece of `shape` reads of the first source."""
    source = array.sources[0]
    box = intersect(tuple((0, extent) for extent in shape), array.region(source))
    if box is None or not array.shape:
        return LONG_RUN
    read = box_shape(pull_chain(array.ops, relative_to(box, array.region(source)), source.shape))
    run = 1
    for wanted, extent in zip(reversed(read), reversed(source.shape), strict=True):
        run *= wanted
        if wanted < extent:
            break
    else:
        return LONG_RUN  # the whole tensor
    return run * itemsize(array.dtype)


def bands(
    array: ArrayPlan, piece: Piece, limit: int, tensors: Mapping[str, TensorInfo] = MappingProxyType({})
) -> Iterator[Band]:
    """Cuts a piece into bands.

    Args:
        array: The piece's array.
        piece: The piece.
        limit: Bytes, about, of a band.
        tensors: The source's tensors, by name, which give the order of their axes in storage.

    Yields:
        The bands of one source after the other.
    """
    for source in array.sources_in(piece.box):
        region = array.region(source)
        shared = intersect(piece.box, region)
        if shared is None:
            continue
        order = tensors[source.tensor].order if source.tensor in tensors else ()
        for result in _cut_bands(array, source, relative_to(shared, region), order, limit):
            read = source.in_tensor(pull_chain(array.ops, result, source.shape))
            yield Band(source, read, result, shift(result, source.at))


def _cut_bands(array: ArrayPlan, source: SourceSlice, result: Box, order: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Cuts a box of the ops' output into parts that each read some rows of the source, about `limit` bytes."""
    read = pull_chain(array.ops, result, source.shape)
    nbytes = size(read) * itemsize(array.dtype)
    axis = _row_axis(array, source, result, read, order) if nbytes > limit else None
    if axis is None:
        yield result
        return
    start, stop = result[axis]
    parts = -(-nbytes // limit)
    step = max(1, (stop - start) // parts)
    if step > 128:
        step -= step % 128  # quantization blocks and cache lines
    for begin in range(start, stop, step):
        band = (*result[:axis], (begin, min(begin + step, stop)), *result[axis + 1 :])
        # one expert of a stacked tensor may be larger than a band: then its rows are cut
        yield from _cut_bands(array, source, band, order, limit) if step == 1 else (band,)


def _row_axis(array: ArrayPlan, source: SourceSlice, result: Box, read: Box, order: tuple[int, ...]) -> int | None:
    """Returns the output axis that the rows of the source become; None if the ops mix them.

    Rows are along the first axis, in storage order, on which `read` spans more than one index.
    """
    lead = next((axis for axis in order or range(len(read)) if read[axis][1] - read[axis][0] > 1), 0)
    for axis, (start, stop) in enumerate(result):
        if stop - start < 2:
            continue
        first = (*result[:axis], (start, start + 1), *result[axis + 1 :])
        part = pull_chain(array.ops, first, source.shape)
        alike = (*part[:lead], *part[lead + 1 :]) == (*read[:lead], *read[lead + 1 :])
        if alike and part[lead][1] - part[lead][0] <= (read[lead][1] - read[lead][0]) // 2:
            return axis
    return None
