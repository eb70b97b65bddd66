"""`ferry export`: a MaxText checkpoint as a Hugging Face one that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from conversion_lib.conversions.opening import open_maxtext
from conversion_lib.conversions.runner import Conversion, ConvertResult, run
from conversion_lib.conversions.side_files import copy_side_files, write_record
from conversion_lib.core.boxes import Box
from conversion_lib.core.tensors import Array
from conversion_lib.engine.limits import largest_chunk
from conversion_lib.errors import BadInput
from conversion_lib.mapping.rules import Family
from conversion_lib.mapping.stored_checkpoint import MaxTextInput
from conversion_lib.mapping.to_hugging_face import plan_to_hugging_face
from conversion_lib.models.hf_config import DTYPE_KEYS, QUANTIZATION_KEY, ModelConfig, shown
from conversion_lib.plan.job import Job
from conversion_lib.plan.plan import ArrayPlan
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.runs.options import DEFAULT_OPTIONS, Options
from conversion_lib.runs.trees import hf_staging
from conversion_lib.sinks.safetensors import SafetensorsSink, SliceWrite
from conversion_lib.sources.orbax import Where
from conversion_lib.sources.weight_files import SINGLE_NAME

DTYPES = ("bfloat16", "float32", "float16")
SHARD_BYTES = 5 * 10**9
"""Largest size of a file, unless one tensor is larger."""

CACHE_SHARE = 2
"""Decoded chunks take the memory budget divided by this. It can be half, since no chunk is encoded here."""

TEXT_ONLY = "ForCausalLM"
"""Suffix of transformers' classes for text-only models."""


def export(
    checkpoint: Where,
    destination: Path,
    *,
    hf_config: Path | None = None,
    dtype: str | None = None,
    model: str | None = None,
    written_by: str | None = None,
    options: Options = DEFAULT_OPTIONS,
    reporter: Reporter = SILENT,
) -> ConvertResult:
    """Writes a MaxText checkpoint as a Hugging Face one that transformers loads. Resumes like `convert`.

    Args:
        checkpoint: DST, DST/0 or DST/0/items.
        destination: The directory to write.
        hf_config: A directory with the model's config and tokenizer. None: `hf/` beside the checkpoint.
        dtype: The dtype of the tensors. None: each has the source's, or if that is not known, the config's.
        model: As for `open_maxtext`.
        written_by: As for `open_maxtext`.
        options: Memory budget, threads, whether to overwrite.
        reporter: Shows progress and messages.

    Raises:
        BadInput: The checkpoint, its config or the destination is wrong, or float16 cannot hold a value.
        OutsideFailure: Reading or writing failed, or another run is writing the same destination.
    """
    staging = hf_staging(destination)

    def prepared(limit: int | None) -> Job:
        budget = options.memory_budget
        given = open_maxtext(
            checkpoint, model=model, hf_config=hf_config, written_by=written_by, cache_bytes=budget // CACHE_SHARE
        )
        return _prepare(given, dtype, limit or largest_chunk(budget))

    def sink(job: Job) -> SafetensorsSink:
        return ExportSink(staging.build.path, job.plan, shards(job.plan.arrays))

    def finish(job: Job) -> None:
        copy_side_files(job.directory, job.config, staging.build.path)
        write_record(staging.build.path, job.plan, job.origin)

    return run(Conversion("export", staging, prepared, sink, lambda job: None, finish), options, reporter)


class ExportSink(SafetensorsSink):
    """Refuses values that float16 cannot hold: bfloat16 weights may be larger."""

    def write(self, array: int, box: Box, data: Array) -> SliceWrite:
        """Writes a box, as the base class does.

        Raises:
            BadInput: A value is infinite in float16.
        """
        if data.dtype == np.float16 and np.isinf(data).any():
            raise BadInput(
                f"tensor {self._plan.arrays[array].path} has values beyond {np.finfo(np.float16).max:.0f}, float16's "
                "largest: --dtype bfloat16 or float32 holds them"
            )
        return super().write(array, box, data)


def _prepare(given: MaxTextInput, dtype: str | None, limit: int) -> Job:
    own = given.record.source_dtypes if given.record and dtype is None else None
    said = dtype or given.config.dtype or (own.rest if own else DTYPES[0])
    if own is None and said not in DTYPES:
        raise BadInput(f"dtype {shown(said)}: --dtype is one of {', '.join(DTYPES)}")
    config = text_config(given.config, given.family, said)
    written = said if own is None else own.model_dump_json()
    identity = given.identity(config=json.dumps(config.raw, sort_keys=True), dtype=written)
    of = own.by_name() if own else lambda name: said
    return given.job(plan_to_hugging_face(given, of, identity, limit), config, limit)


def text_config(config: ModelConfig, family: Family, dtype: str) -> ModelConfig:
    """Returns the config of the text model alone, in `dtype` and not quantized: MaxText has none of the towers."""
    raw, text = config.raw, config.raw.get("text_config")
    if isinstance(text, dict):
        architecture = next(name for name in family.architectures if name.endswith(TEXT_ONLY))
        shared = {key: raw[key] for key in raw if key.endswith("_token_id") or key == "tie_word_embeddings"}
        kind = text.get("model_type") or f"{config.model_type}_text"
        raw = {**shared, **text, "architectures": [architecture], "model_type": kind}
    elif raw.get("architectures"):
        raw = {**raw, "architectures": list(config.architectures) or [family.architectures[0]]}
    key = "torch_dtype" if "torch_dtype" in config.raw else "dtype"
    raw = {name: value for name, value in raw.items() if name not in (*DTYPE_KEYS, QUANTIZATION_KEY)}
    return ModelConfig({**raw, key: dtype}, config.path)


def shards(arrays: Iterable[ArrayPlan]) -> dict[str, str]:
    """Returns the file name for each array's path, filling files in order up to SHARD_BYTES.

    A single file has no number in its name.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for array in arrays:
        if groups[-1] and filled + array.nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(array.path)
        filled += array.nbytes
    if len(groups) == 1:
        return dict.fromkeys(groups[0], SINGLE_NAME)
    count = len(groups)
    return {
        path: f"model-{number:05d}-of-{count:05d}.safetensors"
        for number, paths in enumerate(groups, start=1)
        for path in paths
    }
