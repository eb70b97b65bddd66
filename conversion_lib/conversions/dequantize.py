"""`ferry dequantize`: a quantized Hugging Face checkpoint as a bfloat16 one."""

from __future__ import annotations

from pathlib import Path

from conversion_lib.conversions.runner import Conversion, ConvertResult, run
from conversion_lib.conversions.side_files import copy_side_files, write_record
from conversion_lib.core.dtypes import itemsize
from conversion_lib.engine.limits import largest_chunk
from conversion_lib.errors import BadInput
from conversion_lib.plan.chunking import run_shape
from conversion_lib.plan.job import Job, bytes_in
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.runs.options import DEFAULT_OPTIONS, Options
from conversion_lib.runs.trees import hf_staging
from conversion_lib.sinks.safetensors import SafetensorsSink
from conversion_lib.sources.files import Files
from conversion_lib.sources.fingerprint import files_identity, origin_of, source_content
from conversion_lib.sources.quantization import dequantized, left_out
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.storage.interface import Location
from conversion_lib.storage.locations import location


def dequantize(
    given: Path | Location | Files,
    destination: Path,
    *,
    options: Options = DEFAULT_OPTIONS,
    reporter: Reporter = SILENT,
) -> ConvertResult:
    """Writes a quantized checkpoint as a bfloat16 one: shards, index, config and all other files.

    Shards keep their names, and tensors that are not quantized are copied. Resumes like `convert`.

    Args:
        given: The checkpoint's directory, or its files if they are not in a local directory.
        destination: The directory to write.
        options: Memory budget, threads, whether to overwrite.
        reporter: Shows progress and messages.

    Raises:
        BadInput: The source is not quantized, or its quantization is not supported; or the destination is wrong.
        OutsideFailure: Reading or writing failed, or another run is writing the same destination.
    """
    staging = hf_staging(destination)

    def sink(job: Job) -> SafetensorsSink:
        files = {name: Path(info.file).name for name, info in job.source.tensors.items()}
        return SafetensorsSink(staging.build.path, job.plan, files)

    def finish(job: Job) -> None:
        copy_side_files(job.directory, job.config, staging.build.path)
        write_record(staging.build.path, job.plan, job.origin)

    def prepared(limit: int | None) -> Job:
        return _prepare_dequantized(given, limit or largest_chunk(options.memory_budget))

    return run(Conversion("dequantize", staging, prepared, sink, lambda job: None, finish), options, reporter)


def _prepare_dequantized(given: Path | Location | Files, limit: int) -> Job:
    if not isinstance(given, Path | Files):
        raise BadInput(f"{given} is a MaxText checkpoint: nothing to dequantize")
    stored = SafetensorsSource(given)
    files = stored.files
    config = files.config()
    source = dequantized(stored, config)
    if source is stored:
        raise BadInput(f"{files.name} is not quantized: nothing to dequantize; convert takes it as it is")
    arrays = tuple(
        ArrayPlan(
            path=info.name,
            shape=info.shape,
            dtype=info.dtype,
            chunk_shape=run_shape(info.shape, itemsize(info.dtype), limit),
            ops=(),
            sources=(SourceSlice(info.name, info.shape, (0,) * len(info.shape)),),
        )
        for info in source.tensors.values()
    )
    identity = files_identity(stored, config)
    plan = Plan(
        kind="safetensors", arrays=arrays, identity=identity, exact=True, dropped=(*_notes(stored), *left_out(source))
    )
    return Job(
        source=source,
        directory=location(files.directory),
        config=config,
        origin=origin_of(stored),
        plan=plan,
        bytes_in=bytes_in(plan, source),
        chunk_limit=limit,
        name=files.name,
        notes=tuple(files.doubts(stored.shards)),
        content=lambda: source_content(SafetensorsSource(files)),
    )


def _notes(stored: SafetensorsSource) -> tuple[str, ...]:
    """Returns lines about files and tensors that are not there or not read."""
    if not stored.absent:
        return stored.notes
    line = f"not there: {len(stored.absent)} tensors that the index names, such as {next(iter(stored.absent))}"
    return (*stored.notes, line)
