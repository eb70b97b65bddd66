"""Boxes: axis-aligned regions of arrays, as (start, stop) for each dimension.

Lists are made where generators would read as well: these are called for every tensor and every band, and take a
third less time so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    return tuple([(0, size) for size in shape])


def box_shape(box: Box) -> Shape:
    return tuple([stop - start for start, stop in box])


def slices(box: Box) -> tuple[Any, ...]:
    """The index of `box`; the ellipsis at its end makes a view of a scalar too."""
    return (*(slice(start, stop) for start, stop in box), ...)


def shift(box: Box, offset: Sequence[int]) -> Box:
    """The same box with `offset` added to each dimension."""
    return tuple([(start + by, stop + by) for (start, stop), by in zip(box, offset, strict=True)])


def relative_to(box: Box, outer: Box) -> Box:
    """`box` in the coordinates of `outer`'s corner."""
    return tuple([(start - by, stop - by) for (start, stop), (by, _) in zip(box, outer, strict=True)])


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes of the same rank share, None where that is empty."""
    shared = tuple([(max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True)])
    return None if any(start >= stop for start, stop in shared) else shared


def size(box: Box) -> int:
    """Number of elements; 1 for a scalar's box."""
    return math.prod([stop - start for start, stop in box])


def split(box: Box, axis: int, step: int) -> Iterator[Box]:
    """Cuts `box` along `axis` at multiples of `step`, counted from its own start."""
    start, stop = box[axis]
    for begin in range(start, stop, step):
        yield (*box[:axis], (begin, min(begin + step, stop)), *box[axis + 1 :])
