"""Cutting a plan into pieces, the units of work, and a piece into bands, the units of a read.

A piece is a box of one array made of whole chunks, so that writing it twice is harmless. It is one chunk, or as many
as it takes for its sources to be read in long runs: a transposed array's chunk needs some columns of every row of
its source. A band is the part of one source that is read and transformed at once.
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
"""Bytes that lie one after the other in a source; longer runs read no faster."""


class Piece(NamedTuple):
    """A chunk-aligned box of the array `plan.arrays[array]`."""

    array: int
    box: Box


class Band(NamedTuple):
    """Read `read`, a box of `source`'s tensor; after the ops it is `write`, a box of the array."""

    source: SourceSlice
    read: Box
    result: Box
    """The band in the coordinates of the ops' output: what the ops are asked for."""
    write: Box


def whole_arrays(plan: Plan) -> list[Piece]:
    """Every array as one piece."""
    return [Piece(number, whole(array.shape)) for number, array in enumerate(plan.arrays)]


def cut(plan: Plan, share: Iterable[Piece], limit: int) -> list[Piece]:
    """Cuts the pieces of `share` into smaller ones, `limit` bytes each at most where one chunk is no larger."""
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
    """A sort key: pieces in the order in which their first tensors lie in the source, to read it front to back.

    Of a source that is stored in chunks, pieces that read the same chunk come one after the other.
    tensors: the names of the source's tensors, in the order of its files.
    """
    order = {name: place for place, name in enumerate(tensors)}

    def key(piece: Piece) -> tuple[int, Shape, int]:
        array = plan.arrays[piece.array]
        first = array.first_source(piece.box)
        return order[first.tensor], _chunk_read_first(array, first, piece.box), piece.array

    return key


def _chunk_read_first(array: ArrayPlan, source: SourceSlice, box: Box) -> Shape:
    """The place, in the grid of its chunks, of the first chunk of `source` that a piece with that box reads."""
    if array.source_chunk is None:
        return ()
    shared = intersect(box, array.region(source))
    if shared is None:
        return ()
    result = relative_to(shared, array.region(source))
    read = source.in_tensor(pull_chain(array.ops, result, source.shape))
    return tuple(start // step for (start, _), step in zip(read, array.source_chunk, strict=True))


def piece_shape(array: ArrayPlan, limit: int) -> Shape:
    """Whole chunks, doubled along the axis that lengthens the runs of the source most, while `limit` allows.

    A source that is stored in chunks of its own has no runs.
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
    """Bytes of the first source that lie one after the other in what a piece of `shape` reads of it."""
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
    """What to read and where it goes, for one piece, about `limit` bytes at once.

    tensors: these say in what order the source stores them.
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
    """Cuts a box of the ops' output so that each part reads some rows of the source, about `limit` bytes of them."""
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
        # an expert of a tensor that holds many may be more than a band by itself: then its own rows are cut
        yield from _cut_bands(array, source, band, order, limit) if step == 1 else (band,)


def _row_axis(array: ArrayPlan, source: SourceSlice, result: Box, read: Box, order: tuple[int, ...]) -> int | None:
    """The axis of the output that the rows of the source become, None where the ops mix them.

    Rows lie along the first axis, in storage, of which more than one place is read.
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
