"""The conversions: Hugging Face to MaxText, and fp8 to bfloat16. Each is a plan, run by the one engine."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

import conversion_lib
from conversion_lib import catalog, engine
from conversion_lib.boxes import Shape, whole
from conversion_lib.config import CONFIG_NAME, ModelConfig, load_config
from conversion_lib.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.files import write_atomically
from conversion_lib.identity import HF_RECORD_NAME, origin_of, source_identity
from conversion_lib.journal import Journal
from conversion_lib.mapping import plan_to_maxtext
from conversion_lib.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.record import HF_DIR_NAME, RECORD_NAME, REPORT_DIR_NAME, CheckpointRecord, Origin, Target
from conversion_lib.rules import Family
from conversion_lib.sinks.base import Sink
from conversion_lib.sinks.orbax import OrbaxSink
from conversion_lib.sinks.safetensors import SafetensorsSink
from conversion_lib.sources.base import Source
from conversion_lib.sources.quantization import dequantized
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.workspace import Layout, Workspace, noted_chunk_limit

DISK_MARGIN = 1.05
"""On disk, at most so many bytes for each byte of payload."""

NOT_CARRIED = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)|\..*|.*\.index\.json")
"""Files of a source that are weights in some form, an index of them, or hidden."""


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what to write: none of it changes a bit of the result but `chunk_bytes`' ceiling."""

    memory_budget: int = engine.DEFAULT_BUDGET
    threads: int | None = None
    overwrite: bool = False
    skip_disk_check: bool = False


class ConvertResult(BaseModel):
    """What `ferry convert` and `ferry dequantize` report. Bytes are those of this run."""

    path: str
    fingerprint: str
    already: bool
    bytes_in: int = 0
    bytes_out: int = 0
    pieces: int = 0
    pieces_skipped: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """A source that is open and the plan made for it; nothing has been written."""

    source: Source
    directory: Path
    config: ModelConfig
    origin: Origin
    plan: Plan
    bytes_in: int
    chunk_limit: int = 0


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
    source = dequantized(stored, config)
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

    Resumes an unfinished run of the same fingerprint; does nothing where it is finished. Raises BadInput where the
    source or the destination is not as it must be, OutsideFailure where writing failed.
    """
    layout = maxtext_layout(destination)
    limit = None if options.overwrite else noted_chunk_limit(layout)
    job = prepare(directory, target, model=model, memory_budget=options.memory_budget, chunk_limit=limit)
    plan = job.plan

    def finish() -> None:
        carry_files(job, layout.work / HF_DIR_NAME)
        record = CheckpointRecord(
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
        write_atomically(layout.work / RECORD_NAME, record.model_dump_json(indent=2).encode())

    sink = OrbaxSink(layout.build, plan, target, threads=options.threads or engine.default_threads())
    return _run(job, sink, layout, finish, options, reporter, "convert")


def dequantize(
    directory: Path, destination: Path, *, options: Options = Options(), reporter: Reporter = SILENT
) -> ConvertResult:
    """Writes the fp8 checkpoint in `directory` as a bfloat16 one: shards, index, config and all other files.

    Shards keep their names; tensors that are not fp8 are copied as they are. Resumes and finishes as `convert` does.
    Raises BadInput where the source is not quantized.
    """
    config = load_config(directory)
    stored = SafetensorsSource(directory)
    source = dequantized(stored, config)
    if source is stored:
        raise BadInput(f"{directory} is not quantized: nothing to dequantize; convert takes it as it is")
    limit = engine.largest_chunk(options.memory_budget)
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
    job = Job(source, directory, config, origin_of(directory), plan, _bytes_in(plan, source))
    layout = hf_layout(destination)

    def finish() -> None:
        carry_files(job, layout.build)
        record = {
            "ferry_version": conversion_lib.__version__,
            "fingerprint": plan.fingerprint,
            "identity": plan.full_identity,
            "origin": job.origin.model_dump(),
        }
        write_atomically(layout.build / HF_RECORD_NAME, json.dumps(record, indent=2).encode())

    sink = SafetensorsSink(layout.build, plan, {name: stored.place(name).file.name for name in source.tensors})
    return _run(job, sink, layout, finish, options, reporter, "dequantize")


def _run(
    job: Job,
    sink: Sink,
    layout: Layout,
    finish: Callable[[], None],
    options: Options,
    reporter: Reporter,
    name: str,
) -> ConvertResult:
    """Executes a plan in a workspace: the part that every conversion shares."""
    started, plan = time.monotonic(), job.plan
    path = str(layout.record.parent)
    needed = 0 if options.skip_disk_check else disk_bytes(plan)
    workspace = Workspace(
        layout, plan.full_identity, overwrite=options.overwrite, needed_bytes=needed, chunk_limit=job.chunk_limit
    )
    with workspace:
        if workspace.already:
            reporter.say(f"{path} is already done: fingerprint {plan.fingerprint[:12]}")
            return ConvertResult(path=path, fingerprint=plan.fingerprint, already=True)
        for line in plan.dropped:
            reporter.say(line)
        totals = _execute(job, sink, workspace, options, reporter, name)
        sink.finish()
        finish()
        workspace.commit()
    seconds = time.monotonic() - started
    reporter.say(f"{name}: {format_bytes(totals.bytes_out)} in {seconds:.1f} s")
    return ConvertResult(
        path=path,
        fingerprint=plan.fingerprint,
        already=False,
        bytes_in=totals.bytes_in,
        bytes_out=totals.bytes_out,
        pieces=totals.pieces,
        pieces_skipped=totals.pieces_skipped,
        seconds=seconds,
    )


def _execute(
    job: Job, sink: Sink, workspace: Workspace, options: Options, reporter: Reporter, name: str
) -> engine.Totals:
    sink.open()
    journal = Journal(workspace.journal, job.plan)
    try:
        return engine.run(
            job.plan,
            job.source,
            sink,
            journal,
            budget=options.memory_budget,
            threads=options.threads,
            reporter=reporter,
            name=name,
        )
    except BadInput:
        # found in the data: what was written of it is of no use
        workspace.abandon()
        raise
    finally:
        journal.close()


def disk_bytes(plan: Plan) -> int:
    """What the result takes on disk at most: compression may make it less."""
    return int(sum(array.stored_bytes for array in plan.arrays) * DISK_MARGIN) + (1 << 20)


def carry_files(job: Job, destination: Path) -> None:
    """Copies what a checkpoint has beside its weights: tokenizer, generation config, licence, provenance.

    config.json goes without `quantization_config`, since the weights are plain now.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(job.directory.iterdir()):
        if path.is_file() and path.name not in (CONFIG_NAME, HF_RECORD_NAME) and not NOT_CARRIED.fullmatch(path.name):
            shutil.copyfile(path, destination / path.name)
    raw = {key: value for key, value in job.config.raw.items() if key != "quantization_config"}
    write_atomically(destination / CONFIG_NAME, json.dumps(raw, indent=2).encode())


def _identity(
    stored: SafetensorsSource, config: ModelConfig, family: Family | None, target: Target | None
) -> dict[str, str]:
    canonical = json.dumps(config.raw, sort_keys=True).encode()
    identity = {"source": source_identity(stored), "config": hashlib.sha256(canonical).hexdigest()}
    if family is not None and target is not None:
        identity |= {"family": family.name, "target": target.model_dump_json()}
    return identity


def _bytes_in(plan: Plan, source: Source) -> int:
    return sum(source.stored_bytes(part.tensor, whole(part.shape)) for array in plan.arrays for part in array.sources)


def _rows(shape: Shape, width: int, limit: int) -> Shape:
    """The largest box of whole rows within `limit` bytes: what lies in one run in a safetensors file."""
    if not shape:
        return shape
    row = max(math.prod(shape[1:]) * width, 1)
    # an empty tensor has no chunks, of whatever shape
    return tuple(max(1, extent) for extent in (min(shape[0], limit // row), *shape[1:]))
