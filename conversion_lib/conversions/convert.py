"""`ferry convert`: a Hugging Face checkpoint, or a MaxText one in another layout, as a MaxText checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

import conversion_lib
from conversion_lib.conversions.opening import open_maxtext
from conversion_lib.conversions.runner import Conversion, ConvertResult, run
from conversion_lib.conversions.side_files import copy_side_files
from conversion_lib.core.tensors import Source
from conversion_lib.engine.limits import default_threads, largest_chunk
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.mapping.names import dtypes_by_name
from conversion_lib.mapping.relayout import CACHE_SHARE, prepare_other_layout
from conversion_lib.mapping.rules import Family
from conversion_lib.mapping.to_maxtext import plan_to_maxtext
from conversion_lib.maxtext.files import write_settings
from conversion_lib.maxtext.model import MaxTextModel, model_of_job
from conversion_lib.maxtext.names import size_notes
from conversion_lib.models import catalog
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.job import Job, bytes_in
from conversion_lib.plan.parts import WHOLE
from conversion_lib.plan.plan import Plan
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import (
    HF_DIR_NAME,
    RECORD_NAME,
    CheckpointRecord,
    SourceDtypes,
    Target,
)
from conversion_lib.runs.note import PLAN_NAME
from conversion_lib.runs.options import DEFAULT_OPTIONS, Options
from conversion_lib.runs.trees import maxtext_staging
from conversion_lib.sinks.orbax import OrbaxSink
from conversion_lib.sources.files import Files, LocalFiles
from conversion_lib.sources.fingerprint import dequantized_identity, files_identity, origin_of, source_content
from conversion_lib.sources.heads import TIE_KEY, head_of, own_head, untied
from conversion_lib.sources.joined import joined
from conversion_lib.sources.noted import hf_record
from conversion_lib.sources.orbax import checkpoint_at, is_orbax
from conversion_lib.sources.quantization import dequantized, left_out
from conversion_lib.sources.renamed import HEAD, RenamedSource, plainly_named
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.sources.transformers import TransformersSource
from conversion_lib.sources.weight_files import INDEX_NAME, SINGLE_NAME
from conversion_lib.storage.files import write_atomically
from conversion_lib.storage.interface import Location
from conversion_lib.storage.locations import location

WEIGHTS_KEY = "transformers_weights"
"""Key in config.json for the name of the weight file."""

DEFAULT_LOADER = "safetensors"
LOADERS = (DEFAULT_LOADER, "transformers")
"""How a Hugging Face checkpoint is read: from its files slice by slice, or by transformers, which loads all of it."""


def prepare(
    given: Path | Location | Files,
    target: Target,
    *,
    model: str | None = None,
    memory_budget: int,
    chunk_limit: int | None = None,
    hf_config: Path | None = None,
    written_by: str | None = None,
    loader: str = DEFAULT_LOADER,
) -> Job:
    """Opens a Hugging Face or MaxText checkpoint and plans its conversion to MaxText.

    Args:
        given: The checkpoint's directory, a MaxText checkpoint's location, or a Hugging Face checkpoint's files.
        target: The layout and storage to write.
        model: A name in the catalogue, which determines the family. None: config.json's architecture determines it.
        memory_budget: Bytes.
        chunk_limit: Largest size of a chunk in bytes. None: the target's, or an eighth of the budget if that is less.
        hf_config: For a MaxText checkpoint, as for `open_maxtext`.
        written_by: For a MaxText checkpoint, as for `open_maxtext`.
        loader: One of LOADERS, for a Hugging Face checkpoint.

    Raises:
        BadInput: Something is wrong that headers and config show.
    """
    if loader not in LOADERS:
        raise BadInput(f"--loader {loader}: expected one of {', '.join(LOADERS)}")
    largest = min(target.chunk_bytes, largest_chunk(memory_budget))
    if isinstance(given, Path):
        given = checkpoint_at(given) if is_orbax(given) else LocalFiles(given)
    if loader != DEFAULT_LOADER and not isinstance(given, LocalFiles):
        raise BadInput(f"--loader {loader} reads a Hugging Face checkpoint in a local directory only")
    if not isinstance(given, Files):
        cache = memory_budget // CACHE_SHARE
        found = open_maxtext(given, model=model, hf_config=hf_config, written_by=written_by, cache_bytes=cache)
        return prepare_other_layout(found, target, chunk_limit or largest)
    files = given
    if hf_config or written_by:
        raise BadInput(f"--hf-config and --written-by are for MaxText checkpoints, and {files.name} is not one")
    named = catalog.model_named(model) if model else None
    config = files.config()
    family = FAMILIES[named.family] if named else family_of(config)
    stored = SafetensorsSource(files)
    _require_its_weights(config, stored)
    names: tuple[str, ...] = ()
    if loader == DEFAULT_LOADER:
        named_plainly = plainly_named(stored, tied=bool(family.sizes(config)["tied"]))
        plain = dequantized(named_plainly, config)
        names = (named_plainly.told,) if isinstance(named_plainly, RenamedSource) else ()
    else:
        plain = TransformersSource(stored, config)
    identity = files_identity(stored, config) | {"family": family.name, "target": target.model_dump_json()}
    identity |= _loader_identity(plain, stored)
    weights = plain if loader == DEFAULT_LOADER else stored
    config, head = _with_its_head(config, family, weights, readable=files.readable)
    source = joined(plain, family.joins, family.sizes(config))
    origin = origin_of(stored)
    plan = plan_to_maxtext(
        source.tensors,
        config,
        family,
        target,
        identity=identity,
        model_name=catalog.published_name(origin.repo, Path(origin.path).name),
        chunk_limit=chunk_limit or largest,
        absent=stored.absent,
    )
    plan = replace(plan, dropped=(*stored.notes, *names, *left_out(plain), *head, *plan.dropped))
    return Job(
        source=source,
        directory=location(files.directory),
        config=config,
        origin=origin,
        plan=plan,
        bytes_in=bytes_in(plan, source),
        chunk_limit=chunk_limit or largest,
        name=files.name,
        content=lambda: source_content(SafetensorsSource(files)),
        pace=files.pace(stored, source),
        source_dtypes=lambda: SourceDtypes.of_tensors(dtypes_by_name(plain.tensors, family)),
        notes=(*files.doubts(stored.shards), *size_notes(named, config)),
        resident_bytes=plain.resident_bytes if isinstance(plain, TransformersSource) else 0,
    )


def _require_its_weights(config: ModelConfig, stored: SafetensorsSource) -> None:
    """Raises BadInput if the config names another weight file, which transformers would read."""
    named = config.raw.get(WEIGHTS_KEY)
    if named is not None and named not in (INDEX_NAME, SINGLE_NAME):
        raise BadInput(
            f"{config.path}: {WEIGHTS_KEY} = {named!r}, but {stored.shards[0].name} would be read: weights are "
            f"{SINGLE_NAME}, or what {INDEX_NAME} names. Rename them, and leave {WEIGHTS_KEY} out"
        )


def _with_its_head(
    config: ModelConfig, family: Family, weights: Source, *, readable: bool
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Returns the config that fits the weights' head, and a line if it is not the source's config.

    Raises:
        BadInput: The head is not the embedding that it is tied to, and MaxText's model cannot have such a head.
    """
    if not family.sizes(config)["tied"] or (head := head_of(weights)) is None:
        return config, ()
    if not readable:
        line = f"tied head: a conversion compares {head.name} with the embedding, and keeps it where they differ"
        return config, (line,)
    if own_head(weights) is None:
        return config, ()
    if not any(rule.hf == HEAD for rule in family.rules):
        raise BadInput(
            f"{head.file}: tensor {head.name} is not the embedding, to which {config.path} ties it ({TIE_KEY}), and "
            f"MaxText's {family.name} has no head of its own. Take it out of the file if the embedding is meant"
        )
    line = (
        f"untied head: {head.name} is not the embedding, to which {config.path} ties it, and is kept; the config that "
        "goes along is mended, and MaxText needs logits_via_embedding=false"
    )
    return untied(config), (line,)


def convert(
    given: Path | Location | Files,
    destination: Path | str,
    target: Target,
    *,
    model: str | None = None,
    options: Options = DEFAULT_OPTIONS,
    hf_config: Path | None = None,
    written_by: str | None = None,
    loader: str = DEFAULT_LOADER,
    reporter: Reporter = SILENT,
) -> ConvertResult:
    """Writes a checkpoint as a MaxText one at `destination`/0/items, within a memory budget.

    Resumes an unfinished run with the same fingerprint, and does nothing if the checkpoint is complete. A part writes
    its share and leaves the commit to `finalize`.

    Args:
        given: The checkpoint's directory, a MaxText checkpoint's location, or a Hugging Face checkpoint's files.
        destination: A directory or gs://bucket/prefix.
        target: The layout and storage to write.
        model: As for `prepare`.
        options: Memory budget, threads, whether to overwrite, and the part.
        hf_config: For a MaxText checkpoint, as for `open_maxtext`.
        written_by: For a MaxText checkpoint, as for `open_maxtext`.
        loader: One of LOADERS, for a Hugging Face checkpoint.
        reporter: Shows progress and messages.

    Raises:
        BadInput: The source or the destination is wrong.
        OutsideFailure: Reading or writing failed, or another run is writing the same destination.
    """
    staging = maxtext_staging(destination, alone=not options.among_others)

    def prepared(limit: int | None) -> Job:
        job = prepare(
            given,
            target,
            model=model,
            memory_budget=options.memory_budget,
            chunk_limit=limit,
            hf_config=hf_config,
            written_by=written_by,
            loader=loader,
        )
        model_of_job(job)  # a wrong value that only MaxText's settings need is refused before anything is written
        return job

    def sink(job: Job) -> OrbaxSink:
        threads = options.threads or default_threads()
        return OrbaxSink(staging.build, job.plan, target, part=(options.part or WHOLE).index, threads=threads)

    def begin(job: Job) -> None:
        _leave_plan(staging.work / PLAN_NAME, job.plan)
        with staging.drafts() as directory:
            copy_side_files(job.directory, job.config, directory / HF_DIR_NAME)
            model = model_of_job(job)
            if model is not None and not options.among_others:
                write_settings(directory, model, target)
            record = _record(job, target, model).model_dump_json(indent=2)
            write_atomically(directory / RECORD_NAME, record.encode())

    return run(Conversion("convert", staging, prepared, sink, begin, lambda job: None), options, reporter)


def _leave_plan(path: Location, plan: Plan) -> None:
    """Writes the plan. Raises BadInput if the run has another plan already: chunks of two plans do not fit together."""
    if not path.write_first(plan.to_json()) and not _is_plan(path.read() or b"", plan):
        raise BadInput(
            f"{path} has other arrays or chunks than this version of ferry would write: continue the run with the "
            "version that began it, or remove it with `ferry clean`"
        )


def _is_plan(content: bytes, plan: Plan) -> bool:
    try:
        return Plan.from_json(content).arrays == plan.arrays
    except ValidationError:
        return False


def _record(job: Job, target: Target, model: MaxTextModel | None) -> CheckpointRecord:
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
        origin_fingerprint=origin_fingerprint(job),
        dropped=list(plan.dropped),
        source_dtypes=job.source_dtypes(),
        maxtext_settings=model.run_settings if model else {},
        maxtext_differs=model.reason if model else "",
    )


def origin_fingerprint(job: Job) -> str | None:
    """Returns the fingerprint of converting the original directly, if the source is Ferry's bf16 copy of it.

    With it, conversions with and without that intermediate copy are published under the same name. None if the source
    is not such a copy.
    """
    directory = job.directory.local
    record = hf_record(directory) if directory is not None else None
    original = dequantized_identity(record, job.plan.identity["source"], job.plan.identity["config"])
    if original is None:
        return None
    return replace(job.plan, identity={**job.plan.identity, **original}).fingerprint


def _loader_identity(shown: Source, stored: SafetensorsSource) -> dict[str, str]:
    """Returns what a loader adds to the identity: nothing if it returns the files' own bits."""
    if not isinstance(shown, TransformersSource):
        return {}
    dtypes = {name: info.dtype for name, info in shown.tensors.items() if info.dtype != stored.tensors[name].dtype}
    return {"loader": json.dumps(dtypes, sort_keys=True)} if dtypes else {}
