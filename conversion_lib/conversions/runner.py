"""Runs a conversion: the engine executes its plan in a workspace at the destination, and the result is committed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pydantic import BaseModel, Field

from conversion_lib.core.memory_bound import memory_bound
from conversion_lib.engine import executor
from conversion_lib.engine.limits import peak_estimate
from conversion_lib.errors import BadInput
from conversion_lib.plan.job import Job, disk_bytes
from conversion_lib.plan.parts import WHOLE, Part, chunk_count, shares
from conversion_lib.plan.pieces import Piece
from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.runs.journal import Journal
from conversion_lib.runs.note import Run
from conversion_lib.runs.options import Options
from conversion_lib.runs.workspace import Workspace, journal_of
from conversion_lib.sinks.base import Sink
from conversion_lib.sources.fingerprint import refuse_change
from conversion_lib.storage.interface import Staging


class RunResult(BaseModel):
    """The result of a run that commits. Its text is one line for users.

    Attributes:
        path: The destination.
        fingerprint: Identifies source, config and target.
        already: Whether the output was complete before this run.
        seconds: Wall time of this run.
    """

    path: str
    fingerprint: str
    already: bool
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.what}: {'was already done' if self.already else 'done'}, fingerprint {self.fingerprint[:12]}"

    @property
    def what(self) -> str:
        """What was written, for messages."""
        return self.path


class ConvertResult(RunResult):
    """The result of `ferry convert`, `dequantize` and `export`.

    Attributes:
        bytes_in: Bytes that this run read.
        bytes_out: Bytes that this run wrote, before compression.
        pieces: Pieces that this run wrote.
        pieces_skipped: Pieces that an earlier run had committed.
        part: `I/N`. None: the whole.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    pieces: int = 0
    pieces_skipped: int = 0
    part: str | None = Field(None, exclude_if=lambda part: part is None)

    @property
    def what(self) -> str:
        return f"{self.path}, part {self.part}" if self.part else self.path


@dataclass(frozen=True)
class Conversion:
    """What distinguishes one conversion from another.

    Attributes:
        name: For messages.
        staging: The destination.
        prepare: Plans with chunks of at most this many bytes. None: what the memory budget allows.
        sink: Opens the sink for a job's arrays.
        begin: Writes files that go beside the arrays, before them. Several parts of a run may call it at once.
        finish: Writes files that come after the arrays.
    """

    name: str
    staging: Staging
    prepare: Callable[[int | None], Job]
    sink: Callable[[Job], Sink]
    begin: Callable[[Job], None]
    finish: Callable[[Job], None]


def run(conversion: Conversion, options: Options, reporter: Reporter) -> ConvertResult:
    """Executes a plan, or one part of it, in a workspace. A run of the whole plan also commits.

    Raises:
        BadInput: The source, the destination or an unfinished run there is wrong. What was written from bad data is
            removed.
        OutsideFailure: Reading or writing failed, or another run is writing the same destination.
    """
    started = time.monotonic()
    staging, part = conversion.staging, options.part or WHOLE
    job = conversion.prepare(None)
    given = shares(job.plan, job.source.tensors, part.count)
    noted = Run(
        identity=job.plan.full_identity,
        chunk_limit=job.chunk_limit,
        chunks=tuple(chunk_count(job.plan, share) for share in given),
    )
    needed = 0 if options.skip_disk_check else disk_bytes(job.plan)
    workspace = Workspace(
        staging, noted, part=options.part, overwrite=options.overwrite, needed_bytes=needed, reporter=reporter
    )
    with workspace:
        result = ConvertResult(
            path=staging.shown,
            fingerprint=job.plan.fingerprint,
            already=workspace.already,
            part=str(part) if options.part else None,
        )
        if workspace.already:
            reporter.say(f"{result.path} is already done: fingerprint {result.fingerprint[:12]}")
            return result
        if workspace.run.chunk_limit != job.chunk_limit:
            # the run was begun with another memory budget
            job = conversion.prepare(workspace.run.chunk_limit)
            given = shares(job.plan, job.source.tensors, part.count)
        if options.part and _chunks_done(staging, part, job) == workspace.run.chunks[part.index]:
            reporter.say(f"{result.path}: part {part} is already done")
            return result.model_copy(update={"already": True})
        conversion.begin(job)
        for line in (*job.notes, *job.plan.dropped):
            reporter.say(line)
        expected = peak_estimate(job.plan, options.memory_budget, options.threads) + job.resident_bytes
        with memory_bound(expected, job.name):
            totals = _execute(conversion, job, given[part.index], workspace, options, reporter)
    seconds = time.monotonic() - started
    reporter.say(f"{_title(conversion, options)}: {format_bytes(totals.bytes_out)} in {seconds:.1f} s")
    return result.model_copy(update={**asdict(totals), "seconds": seconds})


def _chunks_done(staging: Staging, part: Part, job: Job) -> int:
    return Journal(journal_of(staging, part.index), job.plan).count


def _title(conversion: Conversion, options: Options) -> str:
    return f"{conversion.name}, part {options.part}" if options.part else conversion.name


def _execute(
    conversion: Conversion,
    job: Job,
    share: Sequence[Piece],
    workspace: Workspace,
    options: Options,
    reporter: Reporter,
) -> executor.Totals:
    """Writes a share, and commits if it is the whole."""
    sink = conversion.sink(job)
    sink.open()
    journal = workspace.open_journal(job.plan)
    try:
        totals = executor.run(
            job.plan,
            share,
            job.source,
            sink,
            journal,
            budget=options.memory_budget,
            threads=options.threads,
            reporter=reporter,
            name=_title(conversion, options),
            pace=job.pace,
        )
        refuse_change(job.name, json.loads(job.plan.identity["source"]), job.content())
    except BadInput:
        # the data are bad, and so is what was written from them
        workspace.abandon()
        raise
    finally:
        journal.close()
    if options.part is None:
        sink.finish()
        conversion.finish(job)
        workspace.commit()
    return totals
