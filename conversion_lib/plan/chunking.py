"""How arrays are cut into chunks: for readers that load shards, and for a writer that streams.

Axis 0 is divided first, into sixteenths where that divides it: what a reader sharded 16 ways (or 8, 4, 2) on that
axis fetches is then whole chunks, and none is decoded for two devices. Then come the layers: as few a chunk as make
it large enough, one where a layer's sixteenth is. Measured, such chunks restore as fast as MaxText's own, which span
all layers; a chunk that two shards share costs each of them the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from conversion_lib.core.boxes import Shape
from conversion_lib.record import SHARDS

SMALLEST = 8 << 20
"""Bytes of a chunk, about at least, where the array has as many: smaller ones cost a request each."""

ABOUT = 2 / 3
"""Of SMALLEST: alignment is worth so much."""

LITTLE_PADDING = 0.03
"""Of an axis: a chunk at its edge is stored whole."""


def chunk_shape(shape: Shape, itemsize: int, limit: int, layer_axis: int | None = None, shards: int = SHARDS) -> Shape:
    """The chunk shape of an array, at most `limit` bytes a chunk.

    layer_axis: the axis that layers are stacked on, None where there is none. shards: how many devices a reader may
    spread axis 0 over; halves of it where that many do not divide the axis, or would leave small chunks.
    """
    chunk = list(shape)
    smallest = min(SMALLEST, limit)
    _cut_to_shards(chunk, itemsize, smallest, shards)
    if layer_axis is not None:
        _cut_layers(chunk, layer_axis, itemsize, smallest, limit)
    for axis in range(len(chunk)):
        _cut_to_limit(chunk, axis, itemsize, limit)
    return tuple(chunk)


def _cut_to_shards(chunk: list[int], itemsize: int, smallest: int, shards: int) -> None:
    """Divides axis 0 by `shards`, halved until that divides it and leaves chunks of about `smallest` bytes."""
    parts, enough = shards, ABOUT * smallest
    while parts > 1 and (chunk[:1] == [] or chunk[0] % parts or math.prod(chunk) // parts * itemsize < enough):
        parts //= 2
    if parts > 1:
        chunk[0] //= parts


def _cut_layers(chunk: list[int], axis: int, itemsize: int, smallest: int, limit: int) -> None:
    """Leaves so few layers in a chunk that it has about `smallest` bytes: a few more where fewer would pad much."""
    layers = chunk[axis]
    layer = max(math.prod(chunk) // max(layers, 1) * itemsize, 1)
    fewest = min(max(1, math.ceil(ABOUT * smallest / layer)), max(1, limit // layer), layers)
    counts = range(fewest, min(2 * fewest, max(fewest, limit // layer), layers) + 1)
    little = next((count for count in counts if -layers % count <= LITTLE_PADDING * layers), None)
    chunk[axis] = little or _least_padding(layers, counts)


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


def run_shape(shape: Shape, width: int, limit: int) -> Shape:
    """The largest box of `limit` bytes at most, or one element, whose elements lie in one run of a safetensors file."""
    for axis, extent in enumerate(shape):
        inner = math.prod(shape[axis + 1 :]) * width
        if extent * inner > limit:
            step = limit // max(inner, 1)
            if step or axis == len(shape) - 1:
                return (*(1,) * axis, max(step, 1), *shape[axis + 1 :])
    # an empty tensor has no chunks, of whatever shape
    return tuple(max(1, extent) for extent in shape)


def run_length(shape: Shape, wanted: Shape) -> int:
    """How many elements of a box of the shape `wanted` lie in one run of a tensor of `shape`."""
    return math.prod(wanted[run_axis(shape, wanted) :])


def run_axis(shape: Shape, wanted: Shape) -> int:
    """The first of the axes that a run spans: one that is taken whole belongs to the run of the one before it."""
    axis = len(shape)
    while axis and wanted[axis - 1] == shape[axis - 1]:
        axis -= 1
    return max(axis - 1, 0)
