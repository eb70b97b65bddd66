"""The conversions: Hugging Face to MaxText, and fp8 to bfloat16. Each is a plan, run by the one engine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, Field

import conversion_lib
from conversion_lib import catalog, engine
from conversion_lib.boxes import Shape, whole
from conversion_lib.carry import carry_files
from conversion_lib.config import ModelConfig, load_config
from conversion_lib.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.files import write_atomically, write_first
from conversion_lib.identity import HF_RECORD_NAME, origin_of, refuse_change, source_content
from conversion_lib.journal import Journal, committed_chunks
from conversion_lib.mapping import plan_to_maxtext
from conversion_lib.parts import WHOLE, Part, chunk_count, shares
from conversion_lib.pieces import Piece
from conversion_lib.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.record import HF_DIR_NAME, RECORD_NAME, REPORT_DIR_NAME, CheckpointRecord, Origin, Target
from conversion_lib.rules import Family
from conversion_lib.sinks.base import Sink
from conversion_lib.sinks.orbax import OrbaxSink
from conversion_lib.sinks.safetensors import SafetensorsSink
from conversion_lib.sources.base import Source
from conversion_lib.sources.joined import joined
from conversion_lib.sources.quantization import dequantized
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.workspace import Layout, Run, Workspace, commit

DISK_MARGIN = 1.05
"""On disk, at most so many bytes for each byte of payload."""

PLAN_NAME = "plan.json"
"""In the work directory of a conversion to MaxText: the plan, for `finalize`, which may not see the source."""


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what to write: none of it changes a bit of the result but `chunk_bytes`' ceiling."""

    memory_budget: int = engine.DEFAULT_BUDGET
    threads: int | None = None
    overwrite: bool = False
    skip_disk_check: bool = False
    part: Part | None = None
    """The share that this worker does, without committing; None: all of it, and commit."""


class ConvertResult(BaseModel):
    """What `ferry convert` and `ferry dequantize` report. Bytes are those of this run.

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
    """A source that is open and the plan made for it; nothing has been written."""

    source: Source
    directory: Path
    config: ModelConfig
    origin: Origin
    plan: Plan
    bytes_in: int
    chunk_limit: int


def maxtext_layout(destination: Path) -> Layout:
    """The paths of a MaxText checkpoint at `destination`."""
    work = destination.absolute() / ".ferry"
    return Layout(
        final=destination.absolute() / "0",
        work=work,
        build=work / "0",
        record=destination.absolute() / RECORD_NAME,
        beside=(HF_DIR_NAME, RECORD_NAME),
        dropped=(REPORT_DIR_NAME,),
        alone=True,
    )


def hf_layout(destination: Path) -> Layout:
    """The paths of a Hugging Face checkpoint that is `destination` itself."""
    final = destination.absolute()
    work = final.with_name(f".{final.name}.ferry")
    return Layout(final=final, work=work, build=work / "build", record=final / HF_RECORD_NAME)


def prepare(
    directory: Path, target: Target, *, model: str | None = None, memory_budget: int, chunk_limit: int | None = None
) -> Job:
    """Opens the checkpoint in `directory` and plans its conversion to MaxText.

    chunk_limit: bytes of a chunk at most; None: the target's, or an eighth of the memory budget where that is less.
    model: a name of the catalogue, which then says the family; None: config.json's architecture does.
    Raises BadInput for everything that headers and config can tell is wrong.
    """
    named = catalog.model_named(model) if model else None
    config = load_config(directory)
    family = FAMILIES[named.family] if named else family_of(config)
    stored = SafetensorsSource(directory)
    source = joined(dequantized(stored, config), family.joins, family.dims(config))
    origin = origin_of(directory)
    largest = min(target.chunk_bytes, engine.largest_chunk(memory_budget))
    plan = plan_to_maxtext(
        source.tensors,
        config,
        family,
        target,
        identity=_identity(stored, config, family, target),
        model_name=named.name if named else catalog.published_name(origin.repo, Path(origin.path).name),
        chunk_limit=chunk_limit or largest,
    )
    return Job(source, directory, config, origin, plan, _bytes_in(plan, source), chunk_limit or largest)


@dataclass(frozen=True)
class Conversion:
    """What distinguishes one conversion from another.

    prepare: plans for chunks of at most so many bytes; None: what the memory budget allows.
    begin: writes what lies beside the arrays and can be written before them; parts of one run do it at once.
    finish: writes what comes after the arrays.
    """

    name: str
    layout: Layout
    prepare: Callable[[int | None], Job]
    sink: Callable[[Job], Sink]
    begin: Callable[[Job], None]
    finish: Callable[[Job], None]


def convert(
    directory: Path,
    destination: Path,
    target: Target,
    *,
    model: str | None = None,
    options: Options = Options(),
    reporter: Reporter = SILENT,
) -> ConvertResult:
    """Writes the Hugging Face checkpoint in `directory` as a MaxText checkpoint at `destination`/0/items.

    Resumes an unfinished run of the same fingerprint; does nothing where it is finished. A part writes its share and
    leaves the rest to `finalize`. Raises BadInput where the source or the destination is not as it must be,
    OutsideFailure where writing failed.
    """
    layout = maxtext_layout(destination)

    def prepared(limit: int | None) -> Job:
        return prepare(directory, target, model=model, memory_budget=options.memory_budget, chunk_limit=limit)

    def sink(job: Job) -> OrbaxSink:
        threads = options.threads or engine.default_threads()
        return OrbaxSink(layout.build, job.plan, target, part=(options.part or WHOLE).index, threads=threads)

    def begin(job: Job) -> None:
        _leave_plan(layout.work / PLAN_NAME, job.plan)
        carry_files(job.directory, job.config, layout.work / HF_DIR_NAME)
        record = _record(job, target).model_dump_json(indent=2)
        write_atomically(layout.work / RECORD_NAME, record.encode())

    return _run(Conversion("convert", layout, prepared, sink, begin, lambda job: None), options, reporter)


def dequantize(
    directory: Path, destination: Path, *, options: Options = Options(), reporter: Reporter = SILENT
) -> ConvertResult:
    """Writes the fp8 checkpoint in `directory` as a bfloat16 one: shards, index, config and all other files.

    Shards keep their names; tensors that are not fp8 are copied as they are. Resumes and finishes as `convert` does.
    Raises BadInput where the source is not quantized.
    """
    layout = hf_layout(destination)

    def sink(job: Job) -> SafetensorsSink:
        files = {name: Path(info.file).name for name, info in job.source.tensors.items()}
        return SafetensorsSink(layout.build, job.plan, files)

    def finish(job: Job) -> None:
        carry_files(job.directory, job.config, layout.build)
        record = {
            "ferry_version": conversion_lib.__version__,
            "fingerprint": job.plan.fingerprint,
            "identity": job.plan.full_identity,
            "origin": job.origin.model_dump(),
        }
        # the last to be written: files that are younger count as changed
        write_atomically(layout.build / HF_RECORD_NAME, json.dumps(record, indent=2).encode())

    def prepared(limit: int | None) -> Job:
        return _prepare_dequantized(directory, limit or engine.largest_chunk(options.memory_budget))

    return _run(Conversion("dequantize", layout, prepared, sink, lambda job: None, finish), options, reporter)


def _prepare_dequantized(directory: Path, limit: int) -> Job:
    config = load_config(directory)
    stored = SafetensorsSource(directory)
    source = dequantized(stored, config)
    if source is stored:
        raise BadInput(f"{directory} is not quantized: nothing to dequantize; convert takes it as it is")
    arrays = tuple(
        ArrayPlan(
            path=info.name,
            shape=info.shape,
            dtype=info.dtype,
            chunk_shape=_rows(info.shape, itemsize(info.dtype), limit),
            ops=(),
            sources=(SourceSlice(info.name, info.shape, (0,) * len(info.shape)),),
        )
        for info in source.tensors.values()
    )
    plan = Plan(kind="safetensors", arrays=arrays, identity=_identity(stored, config, None, None), exact=True)
    return Job(source, directory, config, origin_of(directory), plan, _bytes_in(plan, source), limit)


def _run(conversion: Conversion, options: Options, reporter: Reporter) -> ConvertResult:
    """Executes a plan, or a part of it, in a workspace; the whole is committed too."""
    started = time.monotonic()
    layout, part = conversion.layout, options.part or WHOLE
    job = conversion.prepare(None)
    given = shares(job.plan, job.source.tensors, part.count)
    run = Run(
        identity=job.plan.full_identity,
        chunk_limit=job.chunk_limit,
        chunks=tuple(chunk_count(job.plan, share) for share in given),
    )
    needed = 0 if options.skip_disk_check else disk_bytes(job.plan)
    with Workspace(layout, run, part=options.part, overwrite=options.overwrite, needed_bytes=needed) as workspace:
        result = ConvertResult(
            path=str(layout.record.parent),
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
        done = committed_chunks(workspace.journal, job.plan) == workspace.run.chunks[part.index]
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
    workspace: Workspace,
    options: Options,
    reporter: Reporter,
) -> engine.Totals:
    """Writes a share; commits where it is the whole."""
    sink = conversion.sink(job)
    sink.open()
    journal = Journal(workspace.journal, job.plan)
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
        )
        refuse_change(job.directory, json.loads(job.plan.identity["source"]))
    except BadInput:
        # found in the data: what was written of it is of no use
        workspace.abandon()
        raise
    finally:
        journal.close()
    if options.part is None:
        sink.finish()
        conversion.finish(job)
        commit(conversion.layout)
    return totals


def _leave_plan(path: Path, plan: Plan) -> None:
    """Raises BadInput where the run goes by another plan already: chunks of two do not fit together."""
    if not write_first(path, plan.to_json()) and Plan.from_json(path.read_bytes()).arrays != plan.arrays:
        raise BadInput(
            f"{path} has other arrays or chunks than this ferry would write: another version began the run; go on with "
            "that one, or remove the run with `ferry clean`"
        )


def _record(job: Job, target: Target) -> CheckpointRecord:
    plan = job.plan
    return CheckpointRecord(
        ferry_version=conversion_lib.__version__,
        fingerprint=plan.fingerprint,
        identity=plan.full_identity,
        family=plan.family,
        model_name=plan.model_name,
        origin=job.origin,
        target=target,
        arrays=len(plan.arrays),
        bytes_in=job.bytes_in,
        bytes_out=plan.bytes_out,
        exact=plan.exact,
        dropped=list(plan.dropped),
    )


def disk_bytes(plan: Plan) -> int:
    """What the result takes on disk at most: compression may make it less."""
    return int(sum(array.stored_bytes for array in plan.arrays) * DISK_MARGIN) + (1 << 20)


def _identity(
    stored: SafetensorsSource, config: ModelConfig, family: Family | None, target: Target | None
) -> dict[str, str]:
    identity = {"source": json.dumps(source_content(stored)), "config": json.dumps(config.raw, sort_keys=True)}
    if family is not None and target is not None:
        identity |= {"family": family.name, "target": target.model_dump_json()}
    return identity


def _bytes_in(plan: Plan, source: Source) -> int:
    """Bytes of the tensors that the plan takes; one that several arrays take a part of counts once."""
    shapes = {part.tensor: part.shape for array in plan.arrays for part in array.sources}
    return sum(source.stored_bytes(tensor, whole(shape)) for tensor, shape in shapes.items())


def _rows(shape: Shape, width: int, limit: int) -> Shape:
    """The largest box of whole rows within `limit` bytes: what lies in one run in a safetensors file."""
    if not shape:
        return shape
    row = max(math.prod(shape[1:]) * width, 1)
    # an empty tensor has no chunks, of whatever shape
    return tuple(max(1, extent) for extent in (min(shape[0], limit // row), *shape[1:]))
