"""How a memory budget is shared out among what a conversion holds at once."""

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
"""Bytes of buffers for each thread, or two pieces for each that makes them where those are larger: with three times as
much, nothing was faster, and each fresh page costs a fault."""

MAKER_BANDS = 4
"""Bands that a maker holds: as read, dequantized, cast, mixed."""

PROCESS_BYTES = 250 << 20
"""The interpreter with numpy and TensorStore, before any work, and what is free in the heap but not given back yet."""


@dataclass(frozen=True)
class Limits:
    """How a memory budget is shared out, in bytes. bands: of those that all makers hold."""

    buffers: int
    piece: int
    group: int
    band: int
    bands: int

    @staticmethod
    def of(budget: int, threads: int) -> Limits:
        """Raises BadInput for a budget that no piece would fit."""
        _require_enough(budget)
        buffers, band = budget * 3 // 8, band_bytes(budget)
        bands = makers(threads) * MAKER_BANDS * band
        return Limits(buffers, buffers // (2 * makers(threads)), buffers // 8, band, bands)

    @staticmethod
    def for_plan(plan: Plan, budget: int, threads: int) -> Limits:
        """As `of`, with no more buffers than are of use for the pieces of a plan."""
        limits = Limits.of(budget, threads)
        shapes = ((piece_shape(array, limits.piece), itemsize(array.dtype)) for array in plan.arrays)
        largest = max((math.prod(shape) * width for shape, width in shapes), default=0)
        buffers = min(limits.buffers, max(threads * IN_FLIGHT, 2 * makers(threads) * largest))
        return replace(limits, buffers=buffers, group=buffers // 8)

    @property
    def resident(self) -> int:
        """Memory that a run needs: its buffers, as much again for what the codec makes of them, and bands."""
        return 2 * self.buffers + self.bands


def band_bytes(budget: int) -> int:
    """Of a band, about. The larger they are, the fewer calls wait for the interpreter's lock, and the longer are the
    runs that a transposed one is written in: 8 MiB took a tenth to a fifth less time than 2."""
    return min(LARGEST_BAND, max(SMALLEST_BAND, budget // 256))


def largest_chunk(budget: int) -> int:
    """The most bytes of a chunk under `budget`: an eighth, so that a few are in flight at once.

    Raises BadInput for a budget that is too small to run with.
    """
    _require_enough(budget)
    return budget // 8


def _require_enough(budget: int) -> None:
    if budget < SMALLEST_BUDGET:
        raise BadInput(f"a memory budget of {budget} bytes is too small: the least is {SMALLEST_BUDGET >> 20}MiB")


def default_threads() -> int:
    return min(os.cpu_count() or 1, 16)


def makers(threads: int) -> int:
    """How many of `threads` make pieces; all of them encode chunks.

    A core makes pieces several times as fast as it compresses them, and the fewer there are the larger each may be:
    then sources are read in longer runs.
    """
    return min(threads, max(2, threads // 4))


def peak_estimate(plan: Plan, budget: int, threads: int | None) -> int:
    """Bytes of resident memory that a conversion takes at most, by what the engine allows itself."""
    limits = Limits.for_plan(plan, budget, threads or default_threads())
    return PROCESS_BYTES + min(limits.resident, 2 * plan.bytes_out + limits.bands)
