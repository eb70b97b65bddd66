"""Divides a memory budget among buffers, bands and the codec."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from conversion_lib.core.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.plan.pieces import piece_shape
from conversion_lib.plan.plan import Plan

SMALLEST_BUDGET = 64 << 20
SMALLEST_BAND, LARGEST_BAND = 1 << 20, 8 << 20
IN_FLIGHT = 128 << 20
"""Bytes of buffers for each thread. If two pieces for each maker are larger, they count instead.

Three times as much was not faster, and each new page costs a fault.
"""

MAKER_BANDS = 4
"""Copies of a band that a maker has at a time: as read, dequantized, cast, transformed."""

PROCESS_BYTES = 250 << 20
"""Resident memory of the interpreter with numpy and TensorStore before any work, and free memory in the heap."""


@dataclass(frozen=True)
class Limits:
    """The parts of a memory budget, in bytes.

    Attributes:
        buffers: All buffers of pieces together.
        piece: The most for one piece, where a chunk is not larger.
        group: Pieces that are committed together, about.
        band: What is read at a time, about.
        bands: The bands of all makers together.
    """

    buffers: int
    piece: int
    group: int
    band: int
    bands: int

    @staticmethod
    def of(budget: int, threads: int) -> Limits:
        """Divides `budget` bytes.

        Raises:
            BadInput: The budget is less than SMALLEST_BUDGET.
        """
        _require_enough(budget)
        buffers, band = budget * 3 // 8, band_bytes(budget)
        bands = makers(threads) * MAKER_BANDS * band
        return Limits(buffers, buffers // (2 * makers(threads)), buffers // 8, band, bands)

    @staticmethod
    def for_plan(plan: Plan, budget: int, threads: int) -> Limits:
        """Divides `budget` bytes with no more buffers than the pieces of the plan can use.

        Raises:
            BadInput: As `of` raises it.
        """
        limits = Limits.of(budget, threads)
        shapes = ((piece_shape(array, limits.piece), itemsize(array.dtype)) for array in plan.arrays)
        largest = max((math.prod(shape) * width for shape, width in shapes), default=0)
        buffers = min(limits.buffers, max(threads * IN_FLIGHT, 2 * makers(threads) * largest))
        return replace(limits, buffers=buffers, group=buffers // 8)

    @property
    def resident(self) -> int:
        """Bytes that a run needs: its buffers, the same amount for the codec's output, and bands."""
        return 2 * self.buffers + self.bands


def band_bytes(budget: int) -> int:
    """Returns the bytes, about, of a band.

    With larger bands, fewer calls wait for the interpreter's lock, and a transposed band is written in longer runs:
    8 MiB took a tenth to a fifth less time than 2 MiB.
    """
    return min(LARGEST_BAND, max(SMALLEST_BAND, budget // 256))


def largest_chunk(budget: int) -> int:
    """Returns the most bytes of a chunk: an eighth of `budget`, so that several fit at a time.

    Raises:
        BadInput: The budget is less than SMALLEST_BUDGET.
    """
    _require_enough(budget)
    return budget // 8


def _require_enough(budget: int) -> None:
    if budget < SMALLEST_BUDGET:
        raise BadInput(f"a memory budget of {budget} bytes is too small: the minimum is {SMALLEST_BUDGET >> 20}MiB")


def default_threads() -> int:
    """Returns the number of CPUs, at most 16."""
    return min(os.cpu_count() or 1, 16)


def makers(threads: int) -> int:
    """Returns how many of `threads` make pieces; all of them encode chunks.

    A core makes pieces several times as fast as it compresses them. With fewer makers, pieces can be larger, and then
    sources are read in longer runs.
    """
    return min(threads, max(2, threads // 4))


def peak_estimate(plan: Plan, budget: int, threads: int | None) -> int:
    """Returns the most bytes of resident memory that a conversion takes, as calculated from the engine's limits.

    Args:
        plan: The plan to run.
        budget: The memory budget in bytes.
        threads: As for the executor's `run`.

    Raises:
        BadInput: The budget is less than SMALLEST_BUDGET.
    """
    limits = Limits.for_plan(plan, budget, threads or default_threads())
    return PROCESS_BYTES + min(limits.resident, 2 * plan.bytes_out + limits.bands)
