"""The conversions: Hugging Face to MaxText, and quantized to bfloat16. Each is a plan, run by the one engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import conversion_lib
from conversion_lib import catalog
from conversion_lib.carry import carry_files, seal
from conversion_lib.cloud.place import SCHEME, CloudPlace
from conversion_lib.cloud.workspace import CloudLayout
from conversion_lib.config import ModelConfig, load_config
from conversion_lib.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.files import write_atomically
from conversion_lib.identity import HF_RECORD_NAME, origin_of, source_content
from conversion_lib.limits import default_threads, largest_chunk
from conversion_lib.mapping import plan_to_maxtext
from conversion_lib.maxtext_input import open_maxtext
from conversion_lib.other_layout import CACHE_SHARE, prepare_other_layout
from conversion_lib.parts import WHOLE
from conversion_lib.places import Place
from conversion_lib.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import HF_DIR_NAME, RECORD_NAME, REPORT_DIR_NAME, CheckpointRecord, Origin, Target
from conversion_lib.rules import Family
from conversion_lib.running import DEFAULT_OPTIONS, Conversion, bytes_in, run
from conversion_lib.running import ConvertResult as ConvertResult
from conversion_lib.running import Job as Job
from conversion_lib.running import Options as Options
from conversion_lib.running import disk_bytes as disk_bytes
from conversion_lib.sinks.orbax import OrbaxSink
from conversion_lib.sinks.safetensors import SafetensorsSink, run_shape
from conversion_lib.sources.base import Source
from conversion_lib.sources.joined import joined
from conversion_lib.sources.orbax import is_orbax
from conversion_lib.sources.quantization import dequantized, left_out
from conversion_lib.sources.remote import Remote
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.sources.transformers import TransformersSource
from conversion_lib.workspace import Layout

DEFAULT_LOADER = "safetensors"
LOADERS = (DEFAULT_LOADER, "transformers")
"""What reads a Hugging Face checkpoint: its files slice by slice, or transformers, which holds the whole model."""

PLAN_NAME = "plan.json"
"""In the work directory of a conversion to MaxText: the plan, for `finalize`, which may not see the source."""


def layout_at(destination: Path | str, reporter: Reporter = SILENT) -> Layout | CloudLayout:
    """Of a MaxText checkpoint at `destination`, a directory or gs://bucket/prefix. reporter: hears of waits."""
    if isinstance(destination, str) and destination.startswith(SCHEME):
        return CloudLayout(CloudPlace.parse(destination), reporter=reporter)
    return maxtext_layout(Path(destination))


def unfinished_layouts(destination: str, reporter: Reporter = SILENT) -> list[Layout | CloudLayout]:
    """Of every kind of run that may have been left at `destination`."""
    layout = layout_at(destination, reporter)
    return [layout] if isinstance(layout, CloudLayout) else [layout, hf_layout(Path(destination))]


def maxtext_layout(destination: Path) -> Layout:
    """The paths of a MaxText checkpoint in the directory `destination`."""
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
    directory: Path,
    target: Target,
    *,
    model: str | None = None,
    memory_budget: int,
    chunk_limit: int | None = None,
    remote: Remote | None = None,
    hf_config: Path | None = None,
    written_by: str | None = None,
    loader: str = DEFAULT_LOADER,
) -> Job:
    """Opens the checkpoint in `directory`, of Hugging Face or of MaxText, and plans its conversion to MaxText.

    hf_config, written_by: what is said of a MaxText checkpoint, as for `open_maxtext`.
    remote: where the weights are, when only their headers lie in `directory`.
    chunk_limit: bytes of a chunk at most; None: the target's, or an eighth of the memory budget where that is less.
    model: a name of the catalogue, which then says the family; None: config.json's architecture does.
    loader: one of LOADERS, for a Hugging Face checkpoint.
    Raises BadInput for everything that headers and config can tell is wrong.
    """
    if loader not in LOADERS:
        raise BadInput(f"--loader {loader}: expected one of {', '.join(LOADERS)}")
    largest = min(target.chunk_bytes, largest_chunk(memory_budget))
    if loader != DEFAULT_LOADER and (remote or is_orbax(directory)):
        raise BadInput(f"--loader {loader} reads a Hugging Face checkpoint in a directory here, and nothing else")
    if is_orbax(directory):
        given = open_maxtext(
            directory, model=model, hf_config=hf_config, written_by=written_by, cache_bytes=memory_budget // CACHE_SHARE
        )
        return prepare_other_layout(given, target, chunk_limit or largest)
    if hf_config or written_by:
        raise BadInput(f"--hf-config and --written-by are of MaxText checkpoints, and {directory} is none")
    named = catalog.model_named(model) if model else None
    config = load_config(directory)
    family = FAMILIES[named.family] if named else family_of(config)
    stored = remote.open() if remote else SafetensorsSource(directory)
    plain = dequantized(stored, config) if loader == DEFAULT_LOADER else TransformersSource(stored, config)
    source = joined(plain, family.joins, family.dims(config))
    origin = _origin(directory, remote)
    plan = plan_to_maxtext(
        source.tensors,
        config,
        family,
        target,
        identity=_identity(stored, config, family, target) | _loader_identity(plain, stored),
        model_name=named.name if named else catalog.published_name(origin.repo, Path(origin.path).name),
        chunk_limit=chunk_limit or largest,
    )
    plan = replace(plan, dropped=(*left_out(plain), *plan.dropped))
    pace = remote.pace(stored, source) if remote else None
    resident = plain.resident_bytes if isinstance(plain, TransformersSource) else 0
    return Job(source, directory, config, origin, plan, bytes_in(plan, source), chunk_limit or largest, pace, resident)


def convert(
    directory: Path,
    destination: Path | str,
    target: Target,
    *,
    model: str | None = None,
    options: Options = DEFAULT_OPTIONS,
    remote: Remote | None = None,
    hf_config: Path | None = None,
    written_by: str | None = None,
    loader: str = DEFAULT_LOADER,
    reporter: Reporter = SILENT,
) -> ConvertResult:
    """Writes the checkpoint in `directory`, of Hugging Face or of MaxText, as a MaxText one at `destination`/0/items.

    destination: a directory or gs://bucket/prefix.
    hf_config, written_by: what is said of a MaxText checkpoint, as for `open_maxtext`.
    remote: where the weights are, when only their headers lie in `directory`.
    loader: one of LOADERS, for a Hugging Face checkpoint.
    Resumes an unfinished run of the same fingerprint; does nothing where it is finished. A part writes its share and
    leaves the rest to `finalize`. Raises BadInput where the source or the destination is not as it must be,
    OutsideFailure where writing failed.
    """
    layout = replace(layout_at(destination, reporter), alone=not options.among_others)

    def prepared(limit: int | None) -> Job:
        return prepare(
            directory,
            target,
            model=model,
            memory_budget=options.memory_budget,
            chunk_limit=limit,
            remote=remote,
            hf_config=hf_config,
            written_by=written_by,
            loader=loader,
        )

    def sink(job: Job) -> OrbaxSink:
        threads = options.threads or default_threads()
        return OrbaxSink(layout.step, job.plan, target, part=(options.part or WHOLE).index, threads=threads)

    def begin(job: Job) -> None:
        _leave_plan(layout.notes / PLAN_NAME, job.plan)
        with layout.drafts() as directory:
            carry_files(job.directory, job.config, directory / HF_DIR_NAME)
            record = _record(job, target).model_dump_json(indent=2)
            write_atomically(directory / RECORD_NAME, record.encode())

    return run(Conversion("convert", layout, prepared, sink, begin, lambda job: None), options, reporter)


def _origin(directory: Path, remote: Remote | None) -> Origin:
    origin = origin_of(directory)
    return origin.model_copy(update={"path": remote.name}) if remote else origin


def dequantize(
    directory: Path,
    destination: Path,
    *,
    options: Options = DEFAULT_OPTIONS,
    remote: Remote | None = None,
    reporter: Reporter = SILENT,
) -> ConvertResult:
    """Writes the quantized checkpoint in `directory` as a bfloat16 one: shards, index, config and all other files.

    remote: where the weights are, when only their headers lie in `directory`.
    Shards keep their names; tensors that are not quantized are copied. Resumes and finishes as `convert` does.
    Raises BadInput where the source is not quantized.
    """
    layout = hf_layout(destination)

    def sink(job: Job) -> SafetensorsSink:
        files = {name: Path(info.file).name for name, info in job.source.tensors.items()}
        return SafetensorsSink(layout.build, job.plan, files)

    def finish(job: Job) -> None:
        carry_files(job.directory, job.config, layout.build)
        seal(layout.build, job.plan, job.origin)

    def prepared(limit: int | None) -> Job:
        return _prepare_dequantized(directory, remote, limit or largest_chunk(options.memory_budget))

    return run(Conversion("dequantize", layout, prepared, sink, lambda job: None, finish), options, reporter)


def _prepare_dequantized(directory: Path, remote: Remote | None, limit: int) -> Job:
    config = load_config(directory)
    stored = remote.open() if remote else SafetensorsSource(directory)
    source = dequantized(stored, config)
    if source is stored:
        raise BadInput(f"{directory} is not quantized: nothing to dequantize; convert takes it as it is")
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
    identity = _identity(stored, config, None, None)
    plan = Plan(kind="safetensors", arrays=arrays, identity=identity, exact=True, dropped=left_out(source))
    return Job(source, directory, config, _origin(directory, remote), plan, bytes_in(plan, source), limit)


def _leave_plan(path: Place, plan: Plan) -> None:
    """Raises BadInput where the run goes by another plan already: chunks of two do not fit together."""
    if not path.write_first(plan.to_json()) and Plan.from_json(path.read() or b"").arrays != plan.arrays:
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


def _loader_identity(shown: Source, stored: SafetensorsSource) -> dict[str, str]:
    """What a loader adds to the identity: nothing where it gives the files' own bits."""
    if not isinstance(shown, TransformersSource):
        return {}
    dtypes = {name: info.dtype for name, info in shown.tensors.items() if info.dtype != stored.tensors[name].dtype}
    return {"loader": json.dumps(dtypes, sort_keys=True)} if dtypes else {}


def _identity(
    stored: SafetensorsSource, config: ModelConfig, family: Family | None, target: Target | None
) -> dict[str, str]:
    identity = {"source": json.dumps(source_content(stored)), "config": json.dumps(config.raw, sort_keys=True)}
    if family is not None and target is not None:
        identity |= {"family": family.name, "target": target.model_dump_json()}
    return identity
