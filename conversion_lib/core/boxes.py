"""Boxes: axis-aligned regions of arrays, as (start, stop) for each dimension.

The functions use list comprehensions instead of generators: they are called for every tensor and every band, and take a
third less time this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    """Returns the box that covers an array of this shape."""
    return tuple([(0, size) for size in shape])


def box_shape(box: Box) -> Shape:
    """Returns the shape of a box's elements."""
    return tuple([stop - start for start, stop in box])


def slices(box: Box) -> tuple[Any, ...]:
    """Returns the numpy index of a box. It ends with an ellipsis, so that a scalar gives a view too."""
    return (*(slice(start, stop) for start, stop in box), ...)


def shift(box: Box, offset: Sequence[int]) -> Box:
    """Returns the box with `offset` added to each dimension."""
    return tuple([(start + by, stop + by) for (start, stop), by in zip(box, offset, strict=True)])


def relative_to(box: Box, outer: Box) -> Box:
    """Returns `box` in coordinates that start at `outer`'s corner."""
    return tuple([(start - by, stop - by) for (start, stop), (by, _) in zip(box, outer, strict=True)])


def intersect(a: Box, b: Box) -> Box | None:
    """Returns the intersection of two boxes of the same rank, or None if it is empty."""
    shared = tuple([(max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True)])
    return None if any(start >= stop for start, stop in shared) else shared


def size(box: Box) -> int:
    """Returns the number of elements: 1 for a scalar's box."""
    return math.prod([stop - start for start, stop in box])


def split(box: Box, axis: int, step: int) -> Iterator[Box]:
    """Yields the parts of `box`, cut along `axis` at multiples of `step`, counted from the box's start."""
    start, stop = box[axis]
    for begin in range(start, stop, step):
        yield (*box[:axis], (begin, min(begin + step, stop)), *box[axis + 1 :])
