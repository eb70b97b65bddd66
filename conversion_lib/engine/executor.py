"""The executor: reads, transforms and writes on threads within a memory budget, and keeps the journal.

Each worker thread makes one piece at a time, band by band: it reads a slice of a source, applies the ops, and copies
the result into the piece's buffer. The main thread passes finished pieces to the sink in groups. Several groups are
written at once, so that one is compressed while another is synced. A group is journaled when all its writes are
durable. Buffers take at most three eighths of the budget, and no more than codec and disk need to stay busy. The
codec's output may take the same amount. The rest is for bands and for the sink.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from conversion_lib.core.boxes import box_shape, relative_to, size, slices
from conversion_lib.core.copying import cast, copy_into
from conversion_lib.core.dtypes import itemsize, numpy_dtype
from conversion_lib.core.process import HeapLimit
from conversion_lib.core.tensors import Array, Source, stored_bytes
from conversion_lib.engine.buffers import BufferPool
from conversion_lib.engine.limits import Limits, default_threads, makers
from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.plan.ops import forward_chain
from conversion_lib.plan.pace import Ledger, Pace
from conversion_lib.plan.pieces import Piece, bands, cut, source_order
from conversion_lib.plan.plan import Plan
from conversion_lib.progress import SILENT, Reporter, Task
from conversion_lib.runs.options import DEFAULT_BUDGET
from conversion_lib.sinks.base import Sink, Write

GROUP_SECONDS = 10.0
"""A group is committed after this time even if it is small, so that a kill loses little."""

GRACE_SECONDS = 3.0
"""How long a run that is being stopped waits for writes in progress."""

POLL_SECONDS = 0.02


@dataclass
class Totals:
    """The work of a run.

    Attributes:
        pieces: Pieces that this run writes.
        pieces_skipped: Pieces that were already committed.
        bytes_in: Stored bytes that this run read.
        bytes_out: Bytes that this run wrote, before compression.
    """

    pieces: int = 0
    pieces_skipped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


def run(
    plan: Plan,
    share: Sequence[Piece],
    source: Source,
    sink: Sink,
    journal: Ledger,
    *,
    budget: int = DEFAULT_BUDGET,
    threads: int | None = None,
    reporter: Reporter = SILENT,
    name: str = "convert",
    pace: Pace | None = None,
) -> Totals:
    """Writes the pieces of `share` that the journal does not have.

    Args:
        plan: The whole plan.
        share: The pieces of this worker; they are cut into smaller ones if memory requires it.
        source: Where the tensors are read from.
        sink: Where the arrays are written to. The caller opens it before, and calls `finish` afterwards.
        journal: Which pieces are committed; new ones are added.
        budget: Bytes.
        threads: Threads that encode chunks, of which some make pieces; None: one for each CPU, at most 16.
        reporter: Shows progress.
        name: The task's name for the progress.
        pace: What sets the order of pieces; None: the order of the source's files.

    Returns:
        What was done.

    Raises:
        BadInput: The budget is too small, or from the source or the sink: data that are not valid.
        OutsideFailure: From the source or the sink. Everything that is in the journal is kept.
    """
    threads = threads or default_threads()
    limits = Limits.for_plan(plan, budget, threads)
    pieces = cut(plan, share, limits.piece)
    todo = [piece for piece in pieces if not journal.has(piece)]
    totals = Totals(pieces=len(todo), pieces_skipped=len(pieces) - len(todo))
    todo = pace.order(plan, todo) if pace else sorted(todo, key=source_order(plan, source.tensors))
    share_bytes = sum(_nbytes(plan, piece) for piece in share)
    with reporter.task(name, share_bytes) as task:
        task.advance(share_bytes - sum(_nbytes(plan, piece) for piece in todo))
        with _workers(plan, source, todo, makers(threads), limits, pace) as made:
            try:
                _write_groups(plan, sink, journal, made, limits, totals, task)
            except OutsideFailure as error:
                raise OutsideFailure(f"{error}; {task.state} are done and kept") from error
            finally:
                if pace is not None:
                    pace.end()
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


@dataclass
class _Workers:
    """Threads that make pieces in buffers; `results` gets the pieces in the order in which they are finished."""

    results: queue.Queue[_Made] = field(default_factory=queue.Queue)
    buffers: BufferPool = field(default_factory=lambda: BufferPool(0))
    count: int = 0


@contextmanager
def _workers(
    plan: Plan, source: Source, todo: list[Piece], count: int, limits: Limits, pace: Pace | None
) -> Iterator[_Workers]:
    workers = _Workers(buffers=BufferPool(limits.buffers), count=len(todo))
    pending = iter(todo)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                # buffers are acquired under the lock, so that pieces start in order and a large one is not starved
                piece = next(pending, None)
                buffer = None if piece is None else workers.buffers.acquire(_nbytes(plan, piece))
                if piece is None or buffer is None:
                    return
            made = _Made(piece, buffer)
            try:
                made.bytes_in = make(plan, source, piece, shaped(plan, piece, buffer), limits.band)
                if pace is not None:
                    pace.was_read(piece)
            except BaseException as error:
                made.error = error
            workers.results.put(made)

    pool = [threading.Thread(target=work, name=f"ferry-worker-{i}", daemon=True) for i in range(count)]
    for thread in pool:
        thread.start()
    try:
        yield workers
    finally:
        workers.buffers.close()
        for thread in pool:
            thread.join()


def shaped(plan: Plan, piece: Piece, buffer: Array) -> Array:
    """Returns a view of a buffer of uint8 with the piece's shape and dtype."""
    return buffer.view(numpy_dtype(plan.arrays[piece.array].dtype)).reshape(box_shape(piece.box))


def make(plan: Plan, source: Source, piece: Piece, out: Array, band_limit: int) -> int:
    """Makes one piece.

    Args:
        plan: The plan that the piece is of.
        source: Where the tensors are read from.
        piece: The piece.
        out: The array to fill, with the piece's shape and dtype.
        band_limit: Bytes, about, to read at a time.

    Returns:
        The number of stored bytes that were read.

    Raises:
        BadInput: As the source raises it.
        OutsideFailure: As the source raises it.
    """
    array, read = plan.arrays[piece.array], 0
    for band in bands(array, piece, band_limit, source.tensors):
        block = cast(source.read(band.source.tensor, band.read), array.ops_dtype or array.dtype)
        block = forward_chain(array.ops, block, band.result, band.source.shape)
        copy_into(out[slices(relative_to(band.write, piece.box))], cast(block, array.dtype))
        read += stored_bytes(source, band.source.tensor, band.read)
    return read


def _write_groups(
    plan: Plan, sink: Sink, journal: Ledger, made: _Workers, limits: Limits, totals: Totals, task: Task
) -> None:
    """Writes pieces as they are finished, and collects a group while earlier groups are committed."""
    groups, heap = _Groups(journal, made.buffers, task, limits.group), HeapLimit(limits.resident)
    try:
        for _ in range(made.count):
            result = _next(made, groups)
            if result.error is not None:
                raise result.error
            piece, data = result.piece, shaped(plan, result.piece, result.buffer)
            groups.add(piece, sink.write(piece.array, piece.box, data), result.buffer)
            heap.keep()
            totals.bytes_in += result.bytes_in
            totals.bytes_out += data.nbytes
        groups.finish()
    except BadInput:
        # the caller removes the work directory: nothing may write there any more
        groups.settle()
        raise
    except BaseException:
        # the source cannot be read, the disk is full, or the run is stopped: keep as much as possible
        groups.keep(GRACE_SECONDS)
        raise


def _next(made: _Workers, groups: _Groups) -> _Made:
    """Waits for the next piece. Meanwhile, journals groups that are durable, which frees their buffers."""
    while True:
        groups.journal_durable()
        if made.results.empty() and (made.buffers.waited_for or groups.overdue):
            # the workers wait for the buffers of the collected pieces, or for their source
            groups.start()
        with suppress(queue.Empty):
            return made.results.get(timeout=POLL_SECONDS)


class _Groups:
    """Groups of pieces: one is being collected, and the earlier ones are being written, oldest first."""

    def __init__(self, journal: Ledger, pool: BufferPool, task: Task, limit: int) -> None:
        self._journal, self._pool, self._task, self._limit = journal, pool, task, limit
        self._gathering = _Group()
        self._started: deque[_Group] = deque()

    def add(self, piece: Piece, write: Write, buffer: Array) -> None:
        self._gathering.add(piece, write, buffer)
        if self._gathering.nbytes >= self._limit or self.overdue:
            self.start()

    @property
    def overdue(self) -> bool:
        return self._gathering.age > GROUP_SECONDS

    def start(self) -> None:
        """Starts to make the collected pieces durable."""
        if self._gathering.pieces:
            self._gathering.start()
            self._started.append(self._gathering)
            self._gathering = _Group()

    def journal_durable(self) -> None:
        """Journals the groups that are durable, without waiting. Raises OutsideFailure if a write failed."""
        while self._started and self._started[0].done():
            self._commit_oldest()

    def finish(self) -> None:
        """Writes and journals all groups, and waits for them."""
        self.start()
        while self._started:
            self._commit_oldest()

    def keep(self, seconds: float) -> None:
        """Journals the groups that become durable within `seconds`, up to the first that does not."""
        deadline = time.monotonic() + seconds
        with suppress(FerryError, OSError):
            self.start()
            while self._started and time.monotonic() < deadline:
                self.journal_durable()
                time.sleep(POLL_SECONDS)

    def settle(self) -> None:
        """Waits until no write is in progress, and ignores failures."""
        for group in (*self._started, self._gathering):
            group.settle()

    def _commit_oldest(self) -> None:
        group = self._started.popleft()
        group.wait()
        self._journal.add(group.pieces)
        for buffer in group.buffers:
            self._pool.release(buffer)
        self._task.advance(group.nbytes)


class _Group:
    """Pieces that are committed and journaled together."""

    def __init__(self) -> None:
        # one list: a signal between two appends must not leave a piece without its write
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
