"""Parts: the shares that a plan is split into, one for each worker.

A share follows from the plan and the number of parts alone, so that workers of any memory and any number of threads
agree on it without talking. The plan is cut into units, which lie in the order of the source and are given out in
runs: a worker reads its own stretch of the source. It cuts its units into pieces as its memory allows.
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
"""Of a unit at most, where one chunk is no larger. Part of what makes two workers agree: never to depend on one."""


@dataclass(frozen=True)
class Part:
    """The share `index` of `count`, counted from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @staticmethod
    def parse(text: str) -> Part:
        """The part in `I/N`. N/N is 0/N, so that counting from 1 covers all N as well. Raises BadInput for no part."""
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and int(count) > 0 and int(index) <= int(count):
            return Part(int(index) % int(count), int(count))
        raise BadInput(f"--part {text}: write I/N, such as 0/4 for the first of 4 parts; I is at most N")


WHOLE = Part(0, 1)


def shares(plan: Plan, tensors: Iterable[str], count: int) -> list[list[Piece]]:
    """The units of each of `count` parts: together the whole plan, each part within one unit of the mean in bytes.

    tensors: the names of the source's tensors, in the order of its files.
    """
    if count == 1:
        return [whole_arrays(plan)]
    units = sorted(cut(plan, whole_arrays(plan), UNIT_BYTES), key=source_order(plan, tensors))
    sizes = [size(unit.box) * itemsize(plan.arrays[unit.array].dtype) for unit in units]
    total = sum(sizes)
    given: list[list[Piece]] = [[] for _ in range(count)]
    for unit, nbytes, end in zip(units, sizes, itertools.accumulate(sizes), strict=True):
        # where the middle of a unit lies decides, so that each border is off by half a unit at most
        given[(2 * end - nbytes) * count // (2 * total)].append(unit)
    return given


def chunk_count(plan: Plan, share: Iterable[Piece]) -> int:
    """How many chunks there are in a share."""
    return sum(plan.arrays[unit.array].count_chunks(unit.box) for unit in share)
