"""Splits a plan into parts, one for each worker.

A share depends only on the plan and the number of parts. So workers with different memory and threads agree on it
without communication. The plan is cut into units, sorted in the order of the source, and each part gets consecutive
units: a worker reads its own range of the source. It cuts its units into pieces that fit its memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from conversion_lib.core.boxes import size
from conversion_lib.core.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.plan.pieces import Piece, cut, source_order, whole_arrays
from conversion_lib.plan.plan import Plan

UNIT_BYTES = 256 << 20
"""The most bytes of a unit, unless one chunk is larger. All workers must use the same value."""


@dataclass(frozen=True)
class Part:
    """The part number `index` of `count` parts, counted from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @staticmethod
    def parse(text: str) -> Part:
        """Parses `I/N`. N/N means 0/N, so that counting from 1 works too.

        Raises:
            BadInput: The text is not such a part.
        """
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and int(count) > 0 and int(index) <= int(count):
            return Part(int(index) % int(count), int(count))
        raise BadInput(f"--part {text}: write I/N, such as 0/4 for the first of 4 parts; I must be at most N")


WHOLE = Part(0, 1)


def shares(plan: Plan, tensors: Iterable[str], count: int) -> list[list[Piece]]:
    """Returns the units of each part. Each part's bytes differ from the mean by at most one unit.

    Args:
        plan: The plan to split.
        tensors: The names of the source's tensors, in the order of its files.
        count: The number of parts.
    """
    if count == 1:
        return [whole_arrays(plan)]
    units = sorted(cut(plan, whole_arrays(plan), UNIT_BYTES), key=source_order(plan, tensors))
    sizes = [size(unit.box) * itemsize(plan.arrays[unit.array].dtype) for unit in units]
    total = sum(sizes)
    given: list[list[Piece]] = [[] for _ in range(count)]
    for unit, nbytes, end in zip(units, sizes, itertools.accumulate(sizes), strict=True):
        # the middle of a unit decides, so that each border is off by at most half a unit
        given[(2 * end - nbytes) * count // (2 * total)].append(unit)
    return given


def chunk_count(plan: Plan, share: Iterable[Piece]) -> int:
    """Returns the number of chunks in a share."""
    return sum(plan.arrays[unit.array].count_chunks(unit.box) for unit in share)
