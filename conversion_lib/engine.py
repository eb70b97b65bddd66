"""The executor: reads ahead, transforms, writes behind, on threads, within a memory budget, and journals.

Worker threads each make one piece at a time, band by band: read a slice of a source, apply the ops, copy into the
piece's buffer. The main thread hands finished pieces to the sink in groups; a group is journaled when all of its
writes are durable. Bytes held in buffers never pass half of the budget; the other half is for what the codec makes
of them, for bands, and for the sink.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from conversion_lib.boxes import box_shape, relative_to, size, slices
from conversion_lib.copying import cast, copy_into
from conversion_lib.dtypes import itemsize, numpy_dtype
from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.journal import Journal
from conversion_lib.ops import forward_chain
from conversion_lib.pieces import Piece, bands, cut
from conversion_lib.plan import Plan
from conversion_lib.progress import SILENT, Reporter, Task
from conversion_lib.sinks.base import Sink, Write
from conversion_lib.sources.base import Array, Source

DEFAULT_BUDGET = 2 << 30
SMALLEST_BUDGET = 64 << 20
GROUP_SECONDS = 10.0
"""A group is committed after so long even when small, so that little is lost by a kill."""


@dataclass(frozen=True)
class Limits:
    """How a memory budget is shared out, in bytes."""

    buffers: int
    piece: int
    group: int

    @staticmethod
    def of(budget: int, threads: int) -> Limits:
        """Raises BadInput for a budget that no piece would fit."""
        _require_enough(budget)
        buffers = budget // 2
        return Limits(buffers, max(buffers // (2 * threads), 1), buffers // 4)


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


@dataclass
class Totals:
    """What a run did: pieces written, pieces found committed, bytes read and written by this run."""

    pieces: int = 0
    pieces_skipped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


def run(
    plan: Plan,
    source: Source,
    sink: Sink,
    journal: Journal,
    *,
    budget: int = DEFAULT_BUDGET,
    threads: int | None = None,
    reporter: Reporter = SILENT,
    name: str = "convert",
) -> Totals:
    """Writes every piece of `plan` that the journal does not have. The sink is open; `finish` is the caller's.

    Raises what a source or the sink raises; what was journaled by then stays.
    """
    threads = threads or default_threads()
    limits = Limits.of(budget, threads)
    pieces = cut(plan, limits.piece)
    todo = [piece for piece in pieces if not journal.has(piece)]
    totals = Totals(pieces=len(todo), pieces_skipped=len(pieces) - len(todo))
    todo.sort(key=_source_order(plan, source))
    with reporter.task(name, plan.bytes_out) as task:
        task.advance(plan.bytes_out - sum(_nbytes(plan, piece) for piece in todo))
        with _workers(plan, source, todo, threads, limits.buffers) as made:
            _write_groups(plan, sink, journal, made, limits, totals, task)
    return totals


def _nbytes(plan: Plan, piece: Piece) -> int:
    return size(piece.box) * itemsize(plan.arrays[piece.array].dtype)


def _source_order(plan: Plan, source: Source) -> Callable[[Piece], tuple[int, int]]:
    """Pieces in the order in which their first tensors lie in the source, so that it is read front to back."""
    order = {name: place for place, name in enumerate(source.tensors)}

    def key(piece: Piece) -> tuple[int, int]:
        first = next(plan.arrays[piece.array].sources_in(piece.box))
        return order[first.tensor], piece.array

    return key


@dataclass
class _Made:
    """A piece in its buffer, or the error that stopped a worker."""

    piece: Piece
    buffer: Array
    bytes_in: int = 0
    error: BaseException | None = None


class _Room:
    """Buffers within a limit of bytes: taken before a piece is made, given back when it is durable.

    Buffers given back are used again: fresh memory costs a page fault every 4 KiB, as much time as the copy into it.
    """

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._idle: list[Array] = []
        self._changed = threading.Condition()
        self._closed = False
        self.waited_for = False

    def take(self, nbytes: int) -> Array | None:
        """Waits until there is room for `nbytes`; one buffer always fits. None once closed."""
        with self._changed:
            self.waited_for = not self._fits(nbytes)
            self._changed.wait_for(lambda: self._closed or self._fits(nbytes))
            self.waited_for = False
            self._used += nbytes
            if self._closed:
                return None
            same = next((place for place, buffer in enumerate(self._idle) if buffer.nbytes == nbytes), None)
            if same is not None:
                return self._idle.pop(same)
            while self._idle and self._used + sum(buffer.nbytes for buffer in self._idle) > self._total:
                self._idle.pop(0)
        return np.empty(nbytes, np.uint8)

    def give(self, buffer: Array) -> None:
        with self._changed:
            self._used -= buffer.nbytes
            self._idle.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        return self._used == 0 or self._used + nbytes <= self._total


@dataclass
class _Workers:
    """Threads that turn pieces into buffers; results come out of `results` in the order they are made."""

    results: queue.Queue[_Made] = field(default_factory=queue.Queue)
    room: _Room = field(default_factory=lambda: _Room(0))
    count: int = 0


@contextmanager
def _workers(plan: Plan, source: Source, todo: list[Piece], threads: int, buffers: int) -> Iterator[_Workers]:
    workers = _Workers(room=_Room(buffers), count=len(todo))
    pending = iter(todo)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                # room is taken under the lock, so that pieces are begun in order and a large one is not starved
                piece = next(pending, None)
                buffer = None if piece is None else workers.room.take(_nbytes(plan, piece))
                if piece is None or buffer is None:
                    return
            made = _Made(piece, buffer)
            try:
                made.bytes_in = make(plan, source, piece, shaped(plan, piece, buffer))
            except BaseException as error:
                made.error = error
            workers.results.put(made)

    pool = [threading.Thread(target=work, name=f"ferry-worker-{i}", daemon=True) for i in range(threads)]
    for thread in pool:
        thread.start()
    try:
        yield workers
    finally:
        workers.room.close()
        for thread in pool:
            thread.join()


def shaped(plan: Plan, piece: Piece, buffer: Array) -> Array:
    """A buffer's bytes as the piece's array."""
    return buffer.view(numpy_dtype(plan.arrays[piece.array].dtype)).reshape(box_shape(piece.box))


def make(plan: Plan, source: Source, piece: Piece, out: Array) -> int:
    """Fills `out` with the contents of one piece; returns how many stored bytes were read for it."""
    array, read = plan.arrays[piece.array], 0
    for band in bands(array, piece):
        # rounded first and transformed after, as MaxText does
        block = cast(source.read(band.source.tensor, band.read), array.dtype)
        block = forward_chain(array.ops, block, band.result, band.source.shape)
        copy_into(out[slices(relative_to(band.write, piece.box))], block)
        read += source.stored_bytes(band.source.tensor, band.read)
    return read


def _write_groups(
    plan: Plan, sink: Sink, journal: Journal, made: _Workers, limits: Limits, totals: Totals, task: Task
) -> None:
    """Writes pieces as they are made, one group gathering while the group before is committed."""
    gathering, committing = _Group(), _Group()
    try:
        for _ in range(made.count):
            if gathering.pieces and (gathering.nbytes >= limits.group or gathering.age > GROUP_SECONDS):
                gathering.start()
                committing.commit(journal, made.room, task)
                gathering, committing = _Group(), gathering
            result = _next(made, committing, gathering, journal, task)
            if result.error is not None:
                raise result.error
            piece, data = result.piece, shaped(plan, result.piece, result.buffer)
            gathering.add(piece, sink.write(piece.array, piece.box, data), result.buffer)
            totals.bytes_in += result.bytes_in
            totals.bytes_out += data.nbytes
        for group in (committing, gathering):
            group.start()
            group.commit(journal, made.room, task)
    except BadInput:
        # the work directory is removed next: nothing may still be writing there
        for group in (committing, gathering):
            group.settle()
        raise
    except FerryError:
        # the disk is full, or the run is ended: what was begun before is kept where it can be
        with suppress(FerryError, OSError):
            committing.commit(journal, made.room, task)
        raise


def _next(made: _Workers, committing: _Group, gathering: _Group, journal: Journal, task: Task) -> _Made:
    """The next piece. Where none is ready the time is used to commit what is under way, which frees its buffers."""
    while True:
        if made.results.empty():
            committing.commit(journal, made.room, task)
        if made.room.waited_for and made.results.empty():
            # the workers have no buffers left but those that are being gathered
            gathering.start()
            gathering.commit(journal, made.room, task)
        try:
            return made.results.get(timeout=0.05)
        except queue.Empty:
            continue


class _Group:
    """Pieces that are committed and journaled together."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.nbytes = 0
        self._writes: list[tuple[Write, Array]] = []
        self._since = time.monotonic()

    @property
    def age(self) -> float:
        return time.monotonic() - self._since

    def add(self, piece: Piece, write: Write, buffer: Array) -> None:
        self.pieces.append(piece)
        self._writes.append((write, buffer))
        self.nbytes += buffer.nbytes

    def start(self) -> None:
        for write, _ in self._writes:
            write.start()

    def commit(self, journal: Journal, room: _Room, task: Task) -> None:
        """Waits until every write is durable, then journals; leaves the group empty."""
        if not self.pieces:
            return
        for write, _ in self._writes:
            write.wait()
        journal.add(self.pieces)
        for _, buffer in self._writes:
            room.give(buffer)
        task.advance(self.nbytes)
        self.pieces, self._writes, self.nbytes = [], [], 0
        self._since = time.monotonic()

    def settle(self) -> None:
        """Returns when no write is under way any more, whatever has become of it."""
        for write, _ in self._writes:
            with suppress(OutsideFailure):
                write.wait()
