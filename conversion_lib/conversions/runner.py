"""Running a conversion: its plan, executed by the engine in a workspace of the destination, then committed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pydantic import BaseModel, Field

from conversion_lib.engine import executor
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
    """What a run that commits reports. already: what it was to make had been finished before."""

    path: str
    fingerprint: str
    already: bool
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.what}: {'was already done' if self.already else 'done'}, fingerprint {self.fingerprint[:12]}"

    @property
    def what(self) -> str:
        return self.path


class ConvertResult(RunResult):
    """What `ferry convert`, `dequantize` and `export` report. Bytes are those of this run; part: `I/N`."""

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

    prepare: plans for chunks of at most so many bytes; None: what the memory budget allows.
    begin: writes what lies beside the arrays and can be written before them; parts of one run do it at once.
    finish: writes what comes after the arrays.
    """

    name: str
    staging: Staging
    prepare: Callable[[int | None], Job]
    sink: Callable[[Job], Sink]
    begin: Callable[[Job], None]
    finish: Callable[[Job], None]


def run(conversion: Conversion, options: Options, reporter: Reporter) -> ConvertResult:
    """Executes a plan, or a part of it, in a workspace; the whole is committed too."""
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
            # whoever began had another memory budget
            job = conversion.prepare(workspace.run.chunk_limit)
            given = shares(job.plan, job.source.tensors, part.count)
        if options.part and _chunks_done(staging, part, job) == workspace.run.chunks[part.index]:
            reporter.say(f"{result.path}: part {part} is already done")
            return result.model_copy(update={"already": True})
        conversion.begin(job)
        for line in job.plan.dropped:
            reporter.say(line)
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
    """Writes a share; commits where it is the whole."""
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
        # found in the data: what was written of it is of no use
        workspace.abandon()
        raise
    finally:
        journal.close()
    if options.part is None:
        sink.finish()
        conversion.finish(job)
        workspace.commit()
    return totals
