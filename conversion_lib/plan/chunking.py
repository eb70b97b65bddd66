"""Cuts arrays into chunks that suit readers of shards and a streaming writer.

Axis 0 is divided first, into 16 parts if possible. A reader that shards this axis 16, 8, 4 or 2 ways then fetches whole
chunks, and no chunk is decoded for two devices: that would cost each of them the whole chunk. Layers come next: a chunk
has as few as make it large enough, or one if a sixteenth of a layer is enough. In measurements, such chunks are
restored as fast as MaxText's own, which span all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from conversion_lib.core.boxes import Shape
from conversion_lib.record import SHARDS

SMALLEST = 8 << 20
"""About the fewest bytes of a chunk, if the array is large enough: each chunk costs a request."""

ABOUT = 2 / 3
"""Fraction of SMALLEST that is enough for a chunk that is aligned to shards."""

LITTLE_PADDING = 0.03
"""Fraction of an axis that padding may add: a chunk at the edge is stored whole."""


def chunk_shape(shape: Shape, itemsize: int, limit: int, layer_axis: int | None = None, shards: int = SHARDS) -> Shape:
    """Returns the chunk shape of an array.

    Args:
        shape: The array's shape.
        itemsize: Bytes of an element.
        limit: The most bytes of a chunk before compression.
        layer_axis: The axis that layers are stacked on; None if there is none.
        shards: The number of devices over which a reader may shard axis 0. It is halved until it divides the axis and
            leaves chunks that are large enough.
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
    """Divides axis 0 by `shards`, halved until it divides the axis and leaves chunks of about `smallest` bytes."""
    parts, enough = shards, ABOUT * smallest
    while parts > 1 and (chunk[:1] == [] or chunk[0] % parts or math.prod(chunk) // parts * itemsize < enough):
        parts //= 2
    if parts > 1:
        chunk[0] //= parts


def _cut_layers(chunk: list[int], axis: int, itemsize: int, smallest: int, limit: int) -> None:
    """Leaves just enough layers in a chunk for about `smallest` bytes, or some more if that saves padding."""
    layers = chunk[axis]
    layer = max(math.prod(chunk) // max(layers, 1) * itemsize, 1)
    fewest = min(max(1, math.ceil(ABOUT * smallest / layer)), max(1, limit // layer), layers)
    counts = range(fewest, min(2 * fewest, max(fewest, limit // layer), layers) + 1)
    little = next((count for count in counts if -layers % count <= LITTLE_PADDING * layers), None)
    chunk[axis] = little or _least_padding(layers, counts)


def _cut_to_limit(chunk: list[int], axis: int, itemsize: int, limit: int) -> None:
    """Cuts `axis` into nearly equal parts until a chunk fits `limit`."""
    total, extent = math.prod(chunk) * itemsize, chunk[axis]
    if total <= limit or extent <= 1:
        return
    parts = min(-(-total // limit), extent)
    chunk[axis] = _least_padding(extent, [-(-extent // n) for n in range(parts, min(4 * parts, extent) + 1)])


def _least_padding(extent: int, steps: Iterable[int]) -> int:
    """Returns the first of `steps` that pads `extent` least."""
    return min(steps, key=lambda step: -extent % step)


def run_shape(shape: Shape, width: int, limit: int) -> Shape:
    """Returns the shape of the largest box that is contiguous in a row-major file.

    Args:
        shape: The tensor's shape.
        width: Bytes of an element.
        limit: The most bytes of the box. The box has at least one element.
    """
    for axis, extent in enumerate(shape):
        inner = math.prod(shape[axis + 1 :]) * width
        if extent * inner > limit:
            step = limit // max(inner, 1)
            if step or axis == len(shape) - 1:
                return (*(1,) * axis, max(step, 1), *shape[axis + 1 :])
    # an empty tensor has no chunks, whatever their shape
    return tuple(max(1, extent) for extent in shape)


def run_length(shape: Shape, wanted: Shape) -> int:
    """Returns how many elements of a box of the shape `wanted` are contiguous in a row-major tensor of `shape`."""
    return math.prod(wanted[run_axis(shape, wanted) :])


def run_axis(shape: Shape, wanted: Shape) -> int:
    """Returns the first axis of a run in a row-major tensor: the axis before the trailing ones that `wanted` spans."""
    axis = len(shape)
    while axis and wanted[axis - 1] == shape[axis - 1]:
        axis -= 1
    return max(axis - 1, 0)
