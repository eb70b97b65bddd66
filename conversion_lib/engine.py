"""The executor: reads ahead, transforms, writes behind, on threads, within a memory budget, and journals.

Worker threads each make one piece at a time, band by band: read a slice of a source, apply the ops, copy into the
piece's buffer. The main thread hands finished pieces to the sink in groups; several groups are on their way to the
disk at once, so that one is compressed while another is synced, and each is journaled when all of its writes are
durable. Bytes held in buffers never pass three eighths of the budget; as much again is for what the codec makes of
them, and the rest is for bands and for the sink.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from conversion_lib.boxes import box_shape, relative_to, size, slices
from conversion_lib.copying import cast, copy_into
from conversion_lib.dtypes import itemsize, numpy_dtype
from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.journal import Journal
from conversion_lib.ops import forward_chain
from conversion_lib.pieces import Piece, bands, cut, source_order
from conversion_lib.plan import Plan
from conversion_lib.progress import SILENT, Reporter, Task
from conversion_lib.sinks.base import Sink, Write
from conversion_lib.sources.base import Array, Source

DEFAULT_BUDGET = 2 << 30
SMALLEST_BUDGET = 64 << 20
GROUP_SECONDS = 10.0
"""A group is committed after so long even when small, so that little is lost by a kill."""

GRACE_SECONDS = 3.0
"""How long a run that is ended waits for what it has begun to write."""

POLL_SECONDS = 0.02


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
        buffers = budget * 3 // 8
        return Limits(buffers, buffers // (2 * makers(threads)), buffers // 8)


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


@dataclass
class Totals:
    """What a run did: pieces written, pieces found committed, bytes read and written by this run."""

    pieces: int = 0
    pieces_skipped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


def run(
    plan: Plan,
    share: Sequence[Piece],
    source: Source,
    sink: Sink,
    journal: Journal,
    *,
    budget: int = DEFAULT_BUDGET,
    threads: int | None = None,
    reporter: Reporter = SILENT,
    name: str = "convert",
) -> Totals:
    """Writes what the journal does not have of a plan's `share`. The sink is open; `finish` is the caller's.

    Raises what a source or the sink raises; what was journaled by then stays.
    """
    threads = threads or default_threads()
    limits = Limits.of(budget, threads)
    pieces = cut(plan, share, limits.piece)
    todo = [piece for piece in pieces if not journal.has(piece)]
    totals = Totals(pieces=len(todo), pieces_skipped=len(pieces) - len(todo))
    todo.sort(key=source_order(plan, source.tensors))
    share_bytes = sum(_nbytes(plan, piece) for piece in share)
    with reporter.task(name, share_bytes) as task:
        task.advance(share_bytes - sum(_nbytes(plan, piece) for piece in todo))
        with _workers(plan, source, todo, makers(threads), limits.buffers) as made:
            try:
                _write_groups(plan, sink, journal, made, limits, totals, task)
            except OutsideFailure as error:
                raise OutsideFailure(f"{error}; {task.state} are done and kept") from error
    return totals


def _nbytes(plan: Plan, piece: Piece) -> int:
    return size(piece.box) * itemsize(plan.arrays[piece.array].dtype)


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
        return _mapped(nbytes)

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


def _mapped(nbytes: int) -> Array:
    """Memory of its own, which goes back to the kernel when it is let go: in the heap, buffers of many sizes would
    leave gaps that none of the next ones fits."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


@dataclass
class _Workers:
    """Threads that turn pieces into buffers; results come out of `results` in the order they are made."""

    results: queue.Queue[_Made] = field(default_factory=queue.Queue)
    room: _Room = field(default_factory=lambda: _Room(0))
    count: int = 0


@contextmanager
def _workers(plan: Plan, source: Source, todo: list[Piece], count: int, buffers: int) -> Iterator[_Workers]:
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

    pool = [threading.Thread(target=work, name=f"ferry-worker-{i}", daemon=True) for i in range(count)]
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
    """Writes pieces as they are made, one group gathering while those before it are committed."""
    groups = _Groups(journal, made.room, task, limits.group)
    try:
        for _ in range(made.count):
            result = _next(made, groups)
            if result.error is not None:
                raise result.error
            piece, data = result.piece, shaped(plan, result.piece, result.buffer)
            groups.add(piece, sink.write(piece.array, piece.box, data), result.buffer)
            totals.bytes_in += result.bytes_in
            totals.bytes_out += data.nbytes
        groups.finish()
    except BadInput:
        # the work directory is removed next: nothing may still be writing there
        groups.settle()
        raise
    except BaseException:
        # a source cannot be read, the disk is full, the run is ended: what was made is kept where it can be
        groups.keep(GRACE_SECONDS)
        raise


def _next(made: _Workers, groups: _Groups) -> _Made:
    """The next piece; while there is none, what has become durable is journaled, which frees its buffers."""
    while True:
        groups.journal_durable()
        if made.room.waited_for and made.results.empty():
            # the workers have no buffers left but those that are being gathered
            groups.start()
        with suppress(queue.Empty):
            return made.results.get(timeout=POLL_SECONDS)


class _Groups:
    """Groups of pieces on their way to the disk: one gathers, those before it are being written, oldest first."""

    def __init__(self, journal: Journal, room: _Room, task: Task, limit: int) -> None:
        self._journal, self._room, self._task, self._limit = journal, room, task, limit
        self._gathering = _Group()
        self._started: deque[_Group] = deque()

    def add(self, piece: Piece, write: Write, buffer: Array) -> None:
        self._gathering.add(piece, write, buffer)
        if self._gathering.nbytes >= self._limit or self._gathering.age > GROUP_SECONDS:
            self.start()

    def start(self) -> None:
        """Begins to make durable what was gathered."""
        if self._gathering.pieces:
            self._gathering.start()
            self._started.append(self._gathering)
            self._gathering = _Group()

    def journal_durable(self) -> None:
        """Journals the groups that are durable, without waiting. Raises OutsideFailure where writing one failed."""
        while self._started and self._started[0].done():
            self._commit_oldest()

    def finish(self) -> None:
        """Waits for everything."""
        self.start()
        while self._started:
            self._commit_oldest()

    def keep(self, seconds: float) -> None:
        """Journals what becomes durable in so many seconds, up to the first group that does not."""
        deadline = time.monotonic() + seconds
        with suppress(FerryError, OSError):
            self.start()
            while self._started and time.monotonic() < deadline:
                self.journal_durable()
                time.sleep(POLL_SECONDS)

    def settle(self) -> None:
        """Returns when no write is under way any more, whatever has become of it."""
        for group in (*self._started, self._gathering):
            group.settle()

    def _commit_oldest(self) -> None:
        group = self._started.popleft()
        group.wait()
        self._journal.add(group.pieces)
        for buffer in group.buffers:
            self._room.give(buffer)
        self._task.advance(group.nbytes)


class _Group:
    """Pieces that are committed and journaled together."""

    def __init__(self) -> None:
        # one list: a signal between two appends must not leave a piece here without its write
        self._members: list[tuple[Piece, Write, Array]] = []
        self.nbytes = 0
        self._since = time.monotonic()

    @property
    def pieces(self) -> list[Piece]:
        return [piece for piece, _, _ in self._members]

    @property
    def buffers(self) -> list[Array]:
        return [buffer for _, _, buffer in self._members]

    @property
    def age(self) -> float:
        return time.monotonic() - self._since

    def add(self, piece: Piece, write: Write, buffer: Array) -> None:
        self._members.append((piece, write, buffer))
        self.nbytes += buffer.nbytes

    def start(self) -> None:
        for _, write, _ in self._members:
            write.start()

    def done(self) -> bool:
        return all(write.done() for _, write, _ in self._members)

    def wait(self) -> None:
        for _, write, _ in self._members:
            write.wait()

    def settle(self) -> None:
        for _, write, _ in self._members:
            with suppress(OutsideFailure):
                write.wait()
