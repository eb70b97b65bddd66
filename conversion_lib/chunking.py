"""How arrays are cut into chunks: for readers that load shards, and for a writer that streams.

A chunk holds one layer where a layer is large enough, and is cut along axis 0 first, into sixteenths where that
divides: what a reader sharded 16 ways (or 8, 4, 2) on that axis fetches is then whole chunks. Measured, such chunks
restore as fast as MaxText's own, whose chunks span all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from conversion_lib.boxes import Shape

SMALLEST = 8 << 20
"""Bytes of a chunk, at least about, where the array has as many: smaller ones cost a request each."""

SHARDS = 16


def chunk_shape(shape: Shape, itemsize: int, limit: int, layer_axis: int | None = None) -> Shape:
    """The chunk shape of an array, at most `limit` bytes a chunk.

    layer_axis: the axis that layers are stacked on, None where there is none.
    """
    chunk = list(shape)
    smallest = min(SMALLEST, limit)
    if layer_axis is not None:
        layer = math.prod(shape) // max(shape[layer_axis], 1) * itemsize
        fewest = max(1, min(shape[layer_axis], -(-smallest // max(layer, 1))))
        chunk[layer_axis] = _least_padding(shape[layer_axis], range(fewest, min(2 * fewest, shape[layer_axis]) + 1))
    _cut_to_shards(chunk, itemsize, smallest)
    for axis in range(len(chunk)):
        _cut_to_limit(chunk, axis, itemsize, limit)
    return tuple(chunk)


def _cut_to_shards(chunk: list[int], itemsize: int, smallest: int) -> None:
    """Divides axis 0 by the largest power of two up to SHARDS that leaves chunks no smaller than `smallest`."""
    parts = SHARDS
    while parts > 1 and (chunk[:1] == [] or chunk[0] % parts or math.prod(chunk) // parts * itemsize < smallest):
        parts //= 2
    if parts > 1:
        chunk[0] //= parts


def _cut_to_limit(chunk: list[int], axis: int, itemsize: int, limit: int) -> None:
    """Cuts `axis` into equal parts, or nearly so, until a chunk fits `limit`."""
    total, extent = math.prod(chunk) * itemsize, chunk[axis]
    if total <= limit or extent <= 1:
        return
    parts = min(-(-total // limit), extent)
    chunk[axis] = _least_padding(extent, [-(-extent // n) for n in range(parts, min(4 * parts, extent) + 1)])


def _least_padding(extent: int, steps: Iterable[int]) -> int:
    """Of `steps`, the first that divides `extent` with the least left over: a chunk at the edge is stored whole."""
    return min(steps, key=lambda step: -extent % step)
