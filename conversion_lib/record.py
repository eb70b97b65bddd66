"""What Ferry writes beside the arrays of a checkpoint, so that later steps know what it is.

Layout of a converted checkpoint at `DST`::

    DST/0/items/...            the MaxText checkpoint, as Orbax writes it
    DST/0/_CHECKPOINT_METADATA
    DST/0/commit_success.txt
    DST/ferry.json             the CheckpointRecord below
    DST/hf/                    config, tokenizer and generation files of the source
    DST/report/                what `ferry check` writes: check.json, report.html
    DST/.ferry/                work in progress: only while a conversion is unfinished
    DST/.ferry_on_the_fly.json who converts for a training run, or how that failed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conversion_lib.errors import BadInput, problem_of

RECORD_NAME = "ferry.json"
STEP_NAME = "0"
WORK_NAME = ".ferry"
ON_THE_FLY_LEASE = ".ferry_on_the_fly.json"
HF_DIR_NAME = "hf"
REPORT_DIR_NAME = "report"
CHECK_NAME = "check.json"
REPORT_PAGE_NAME = "report.html"
PROVENANCE_NAME = "provenance.json"
COMMIT_NAME = "commit_success.txt"
"""Orbax's mark of a whole checkpoint; the names above it are Ferry's own."""
HF_RECORD_NAME = "ferry.json"
"""In a Hugging Face directory that Ferry wrote: the fingerprint of the run that did."""

SHARDS = 16
"""Of axis 0 by default, as MaxText's converter simulates so many devices."""


def option_name(field: str) -> str:
    """What the command line calls a field: `--scan-layers`."""
    return "--" + field.replace("_", "-")


class Target(BaseModel):
    """What to write: the layout, the storage and the MaxText that will load it.

    The one definition of these choices: command line, operators, form and catalogue take their names, defaults, values
    and descriptions from here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scan_layers: Annotated[
        bool,
        Field(title="Scanned layers", description="Stack the layers for jax.lax.scan, or store each one separately."),
    ] = True
    save_dtype: Annotated[
        Literal["bfloat16", "float32"], Field(title="Data type", description="Dtype of the arrays.")
    ] = "bfloat16"
    ocdbt: Annotated[
        bool,
        Field(
            title="OCDBT",
            description="MaxText's checkpoint_storage_use_ocdbt: few large files instead of many small ones.",
        ),
    ] = True
    zarr3: Annotated[
        bool, Field(title="zarr3", description="MaxText's checkpoint_storage_use_zarr3: zarr3 instead of zarr2.")
    ] = True
    maxtext: Annotated[
        Literal["0.2.5", "main"],
        Field(
            title="MaxText",
            description="MaxText release that will load it. They differ in DeepSeek-V3's scanned gate bias.",
        ),
    ] = "0.2.5"
    compression: Annotated[Literal["zstd", "none"], Field(title="Compression", description="Codec of the chunks.")] = (
        "zstd"
    )
    chunk_bytes: Annotated[
        int, Field(ge=1 << 10, title="Chunk size", description="Maximum size of a chunk, such as 64MiB.")
    ] = 64 << 20
    shards: Annotated[
        int,
        Field(
            ge=1,
            exclude_if=lambda shards: shards == SHARDS,
            title="Shards",
            description="Number of shards of axis 0 that the chunks align with.",
        ),
    ] = SHARDS
    """Left out of the JSON where it is the default, as in older records."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], label: Callable[[str], str] = lambda field: f"{field} is ") -> Target:
        """The Target with these fields. Raises BadInput for a wrong value; `label` is how that begins."""
        dtype = values.get("save_dtype")
        if isinstance(dtype, str) and dtype.startswith(("float8", "fp8", "int8")):
            raise BadInput(
                f"{label('save_dtype')}{dtype}: MaxText can save it, ferry does not; write bfloat16 or float32"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise BadInput(problem_of(error, label)) from None

    @classmethod
    def values_of(cls, field: str) -> tuple[str, ...]:
        """The values that a field of named ones may have; empty for any other."""
        annotation = cls.model_fields[field].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else ()

    def arguments(self, fields: Iterable[str]) -> list[str]:
        """These fields as the command line takes them."""
        words: list[str] = []
        for field in fields:
            value = getattr(self, field)
            if isinstance(value, bool):
                words.append(option_name(field) if value else option_name(f"no_{field}"))
            else:
                words += [option_name(field), str(value)]
        return words

    @property
    def slug(self) -> str:
        """The name of this target in a published path, such as `scanned-bf16-ocdbt-zarr3-maxtext0.2.5`."""
        words = ["scanned" if self.scan_layers else "unscanned"]
        words.append({"bfloat16": "bf16", "float32": "f32"}[self.save_dtype])
        words += [word for word, on in (("ocdbt", self.ocdbt), ("zarr3", self.zarr3)) if on]
        if not (self.ocdbt or self.zarr3):
            words.append("pathways")
        if self.compression == "none":
            words.append("uncompressed")
        return "-".join([*words, f"maxtext{self.maxtext}"])


CHOSEN_FIELDS = ("scan_layers", "save_dtype", "ocdbt", "zarr3", "maxtext")
"""What a run in Airflow chooses of a Target, and what a checkpoint that is there must match: what its readers see of
it. The other fields say how chunks are stored."""


class Origin(BaseModel):
    """Where the weights came from: a Hub repository at a commit, or a local directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    repo: str | None = None
    commit: str | None = None


class CheckpointRecord(BaseModel):
    """`ferry.json` of a converted checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ferry_version: str
    fingerprint: str
    identity: dict[str, str]
    """What the fingerprint is made of; a later run is compared with it part by part."""
    family: str
    model_name: str
    origin: Origin
    target: Target
    arrays: int
    bytes_in: int
    bytes_out: int
    exact: bool
    """True where every op is exact at this save dtype: a round trip gives back the source's bits."""
    origin_fingerprint: Annotated[str | None, Field(exclude_if=lambda fingerprint: fingerprint is None)] = None
    """Of the source's bf16 copy: what the conversion of the original itself has for a fingerprint. Both are published
    under one name."""
    dropped: list[str] = []
    """Source tensors that a named rule left out, one line for each rule."""


def record_in(read: Callable[[str], bytes | None], where: str) -> CheckpointRecord | None:
    """The record among the files that `read` gives by their names in DST, None where there is none.

    where: DST, for a person. A published checkpoint has its record in its provenance. Raises BadInput where the file is
    there but is not a record.
    """
    name = RECORD_NAME
    try:
        if (content := read(name)) is not None:
            return CheckpointRecord.model_validate_json(content)
        name = PROVENANCE_NAME
        return _Published.model_validate_json(content).record if (content := read(name)) is not None else None
    except ValidationError as error:
        raise BadInput(f"{where}/{name} is not a checkpoint record of this version: {problem_of(error)}") from error


class _Published(BaseModel):
    """`provenance.json` of a published checkpoint, as far as it is read here."""

    record: CheckpointRecord | None = None
