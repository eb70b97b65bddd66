"""Running a conversion: its plan, executed by the engine in a workspace of the destination, then committed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, Field

from conversion_lib import engine
from conversion_lib.cloud.workspace import CloudLayout, CloudWorkspace
from conversion_lib.config import ModelConfig
from conversion_lib.errors import BadInput
from conversion_lib.identity import refuse_change
from conversion_lib.parts import WHOLE, chunk_count, shares
from conversion_lib.pieces import Piece
from conversion_lib.plan import Plan
from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.record import Origin
from conversion_lib.run_options import DEFAULT_OPTIONS as DEFAULT_OPTIONS
from conversion_lib.run_options import Options as Options
from conversion_lib.runs import Run
from conversion_lib.sinks.base import Sink
from conversion_lib.sources.base import Source
from conversion_lib.workspace import Layout, Workspace

DISK_MARGIN = 1.05
"""On disk, at most so many bytes for each byte of payload."""


class ConvertResult(BaseModel):
    """What `ferry convert`, `dequantize` and `export` report. Bytes are those of this run.

    already: the checkpoint, or this part of it, had been finished before.
    """

    path: str
    fingerprint: str
    already: bool
    bytes_in: int = 0
    bytes_out: int = 0
    pieces: int = 0
    pieces_skipped: int = 0
    seconds: float = 0.0
    part: str | None = Field(None, exclude_if=lambda part: part is None)


@dataclass(frozen=True)
class Job:
    """A source that is open and the plan made for it; nothing has been written.

    directory: with config, tokenizer and the other files that go along; also the weights, unless they are in `weights`.
    """

    source: Source
    directory: Path
    config: ModelConfig
    origin: Origin
    plan: Plan
    bytes_in: int
    chunk_limit: int
    pace: engine.Pace | None = None
    resident_bytes: int = 0
    """Memory that the source takes beside what the budget covers."""
    weights: Path | None = None


@dataclass(frozen=True)
class Conversion:
    """What distinguishes one conversion from another.

    prepare: plans for chunks of at most so many bytes; None: what the memory budget allows.
    begin: writes what lies beside the arrays and can be written before them; parts of one run do it at once.
    finish: writes what comes after the arrays.
    """

    name: str
    layout: Layout | CloudLayout
    prepare: Callable[[int | None], Job]
    sink: Callable[[Job], Sink]
    begin: Callable[[Job], None]
    finish: Callable[[Job], None]


def run(conversion: Conversion, options: Options, reporter: Reporter) -> ConvertResult:
    """Executes a plan, or a part of it, in a workspace; the whole is committed too."""
    started = time.monotonic()
    layout, part = conversion.layout, options.part or WHOLE
    job = conversion.prepare(None)
    given = shares(job.plan, job.source.tensors, part.count)
    noted = Run(
        identity=job.plan.full_identity,
        chunk_limit=job.chunk_limit,
        chunks=tuple(chunk_count(job.plan, share) for share in given),
    )
    needed = 0 if options.skip_disk_check else disk_bytes(job.plan)
    with layout.open(noted, part=options.part, overwrite=options.overwrite, needed_bytes=needed) as workspace:
        result = ConvertResult(
            path=layout.shown,
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
        done = layout.committed(part.index, job.plan) == workspace.run.chunks[part.index]
        if options.part and done:
            reporter.say(f"{result.path}: part {part} is already done")
            return result.model_copy(update={"already": True})
        conversion.begin(job)
        for line in job.plan.dropped:
            reporter.say(line)
        totals = _execute(conversion, job, given[part.index], workspace, options, reporter)
    seconds = time.monotonic() - started
    reporter.say(f"{_title(conversion, options)}: {format_bytes(totals.bytes_out)} in {seconds:.1f} s")
    return result.model_copy(update={**asdict(totals), "seconds": seconds})


def _title(conversion: Conversion, options: Options) -> str:
    return f"{conversion.name}, part {options.part}" if options.part else conversion.name


def _execute(
    conversion: Conversion,
    job: Job,
    share: Sequence[Piece],
    workspace: Workspace | CloudWorkspace,
    options: Options,
    reporter: Reporter,
) -> engine.Totals:
    """Writes a share; commits where it is the whole."""
    sink = conversion.sink(job)
    sink.open()
    journal = workspace.open_journal(job.plan)
    try:
        totals = engine.run(
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
        refuse_change(job.weights or job.directory, json.loads(job.plan.identity["source"]))
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


def disk_bytes(plan: Plan) -> int:
    """What the result takes on disk at most: compression may make it less."""
    return int(sum(array.stored_bytes for array in plan.arrays) * DISK_MARGIN) + (1 << 20)


def bytes_in(plan: Plan, source: Source) -> int:
    """Bytes of the tensors that the plan takes; one that several arrays take a part of counts once."""
    taken = {part.tensor for array in plan.arrays for part in array.sources}
    return sum(source.stored_bytes(tensor) for tensor in taken)
