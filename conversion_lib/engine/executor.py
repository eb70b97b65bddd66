"""The executor: reads ahead, transforms, writes behind, on threads, within a memory budget, and journals.

Worker threads each make one piece at a time, band by band: read a slice of a source, apply the ops, copy into the
piece's buffer. The main thread hands finished pieces to the sink in groups; several groups are on their way to the
disk at once, so that one is compressed while another is synced, and each is journaled when all of its writes are
durable. Bytes held in buffers never pass three eighths of the budget, nor what keeps codec and disk busy; as much
again is for what the codec makes of them, and the rest is for bands and for the sink.
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
"""A group is committed after so long even when small, so that little is lost by a kill."""

GRACE_SECONDS = 3.0
"""How long a run that is ended waits for what it has begun to write."""

POLL_SECONDS = 0.02


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
    journal: Ledger,
    *,
    budget: int = DEFAULT_BUDGET,
    threads: int | None = None,
    reporter: Reporter = SILENT,
    name: str = "convert",
    pace: Pace | None = None,
) -> Totals:
    """Writes what the journal does not have of a plan's `share`. The sink is open; `finish` is the caller's.

    pace: None where all of the source is at hand: then pieces are made in the order of its files.

    Raises what a source or the sink raises; what was journaled by then stays.
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
    """Threads that turn pieces into buffers; results come out of `results` in the order they are made."""

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
                # buffers are acquired under the lock, so that pieces are begun in order and a large one is not starved
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
    """A buffer's bytes as the piece's array."""
    return buffer.view(numpy_dtype(plan.arrays[piece.array].dtype)).reshape(box_shape(piece.box))


def make(plan: Plan, source: Source, piece: Piece, out: Array, band_limit: int) -> int:
    """Fills `out` with the contents of one piece; returns how many stored bytes were read for it."""
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
    """Writes pieces as they are made, one group gathering while those before it are committed."""
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
        if made.results.empty() and (made.buffers.waited_for or groups.overdue):
            # the workers have no buffers left but those that are being gathered, or wait for their source
            groups.start()
        with suppress(queue.Empty):
            return made.results.get(timeout=POLL_SECONDS)


class _Groups:
    """Groups of pieces on their way to the disk: one gathers, those before it are being written, oldest first."""

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
            self._pool.release(buffer)
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
