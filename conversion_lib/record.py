"""The record of a checkpoint: what it is, where it came from, and the names of the files around it.

Layout of a converted checkpoint at `DST`::

    DST/0/items/...            the MaxText checkpoint, as Orbax writes it
    DST/0/_CHECKPOINT_METADATA
    DST/0/commit_success.txt
    DST/ferry.json             the CheckpointRecord below
    DST/hf/                    config, tokenizer and generation files of the source
    DST/maxtext_settings.yml   what a MaxText run takes in place of base.yml; models/ belongs with it
    DST/report/                written by `ferry check`: check.json, report.html
    DST/.ferry/                the work directory, only while a conversion is unfinished
    DST/.ferry_on_the_fly.json the lease of a conversion on the fly, or the reason why it failed

and in a Hugging Face checkpoint::

    .ferry_provenance.json     written by `ferry download`: where the files came from
    .ferry_record.json         written by `ferry dequantize` and `ferry export`: the HfRecord below

No hidden file is taken from a repository or a bucket, so neither of these two is.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

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
MAXTEXT_SETTINGS_NAME = "maxtext_settings.yml"
MAXTEXT_MODELS_NAME = "models"
"""The folder in which MaxText looks, beside the settings that it is given, for those of a model's name."""
COMMIT_NAME = "commit_success.txt"
"""Orbax's marker of a complete checkpoint. The names above are Ferry's own."""
HF_RECORD_NAME = ".ferry_record.json"
"""In a Hugging Face directory that Ferry wrote: the record of the run."""
DOWNLOAD_RECORD_NAME = ".ferry_provenance.json"
"""In a directory that Ferry downloaded to."""
NOT_OF_A_SOURCE = (RECORD_NAME, PROVENANCE_NAME)
"""Files that are not taken from a repository: a person would believe that Ferry wrote them."""

MAX_MODEL_KL = 1e-3
"""How far MaxText's function may be from the original's by default: the largest KL of a token, in nats."""
MAX_MODEL_KL_HELP = (
    "Maximum KL divergence of a token between the original's function and MaxText's, on the same weights."
)

SHARDS = 16
"""Default number of shards of axis 0: MaxText's converter simulates this many devices."""


def option_name(field: str) -> str:
    """Returns the command-line option for a field: `scan_layers` -> `--scan-layers`."""
    return "--" + field.replace("_", "-")


class Target(BaseModel):
    """What to write: the layout, the storage format, and the MaxText release that will load it.

    These choices are defined only here. The command line, the operators, the form and the catalogue take names,
    defaults, values and descriptions from this class.
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
    """Omitted from the JSON if it is the default, as in older records."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], label: Callable[[str], str] = lambda field: f"{field} is ") -> Target:
        """Builds a Target from values by field name.

        Args:
            values: What is missing gets its default.
            label: Returns the start of an error message for a field name. The invalid value follows.

        Raises:
            BadInput: A value is not allowed.
        """
        dtype = values.get("save_dtype")
        if isinstance(dtype, str) and dtype.startswith(("float8", "fp8", "int8")):
            raise BadInput(
                f"{label('save_dtype')}{dtype}: MaxText can save it, ferry cannot; choose bfloat16 or float32"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise BadInput(problem_of(error, label)) from None

    @classmethod
    def values_of(cls, field: str) -> tuple[str, ...]:
        """Returns the allowed values of a Literal field, or an empty tuple for any other field."""
        annotation = cls.model_fields[field].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else ()

    def arguments(self, fields: Iterable[str]) -> list[str]:
        """Returns these fields as options of the command line."""
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
        """The target's level of a published path, such as `scanned-bf16-ocdbt-zarr3-maxtext0.2.5`."""
        words = ["scanned" if self.scan_layers else "unscanned"]
        words.append({"bfloat16": "bf16", "float32": "f32"}[self.save_dtype])
        words += [word for word, on in (("ocdbt", self.ocdbt), ("zarr3", self.zarr3)) if on]
        if not (self.ocdbt or self.zarr3):
            words.append("pathways")
        if self.compression == "none":
            words.append("uncompressed")
        return "-".join([*words, f"maxtext{self.maxtext}"])


CHOSEN_FIELDS = ("scan_layers", "save_dtype", "ocdbt", "zarr3", "maxtext")
"""The fields that a run in Airflow can choose and that an existing checkpoint must match: readers see them. The other
fields only set how chunks are stored."""


COMMIT = re.compile("[0-9a-f]{40}")
Commit = Annotated[str, Field(pattern=f"^{COMMIT.pattern}$")]
"""Of a repository on the Hub, in full."""
Record = TypeVar("Record", bound=BaseModel)


def seconds_of(time: str) -> float:
    """Seconds since 1970 of a time in ISO 8601. Raises ValueError where it is none, or does not say from which zone."""
    moment = datetime.datetime.fromisoformat(time)
    try:
        if moment.tzinfo is not None:
            return moment.timestamp()
    except OverflowError:
        raise ValueError(f"{time} is out of range") from None
    raise ValueError(f"{time} has no time zone")


def _as_time(text: str) -> str:
    seconds_of(text)
    return text


Time = Annotated[str, AfterValidator(_as_time)]
"""In ISO 8601, with its zone."""


def is_commit(revision: str) -> bool:
    """Whether it is a commit in full, which never changes."""
    return COMMIT.fullmatch(revision) is not None


def parsed(kind: type[Record], content: bytes, where: object, what: str) -> Record:
    """The record of this kind in `content`. What Ferry or Orbax left in a file is read by this, and by nothing else.

    Args:
        kind: What it is to be.
        content: Of the file.
        where: The file, for a message.
        what: What a person calls it, such as "manifest".

    Raises:
        BadInput: It is damaged, or another version wrote it.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise BadInput(f"{where} is not a {what} of this version: {problem_of(error)}") from None


class Origin(BaseModel):
    """Where the weights came from: a Hub repository at a commit, or a directory or bucket alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """The source's directory or URL. For a bf16 copy made by Ferry, that of the original."""
    repo: str | None = None
    commit: Commit | None = None


class RemoteFile(BaseModel):
    """A file on the Hub: bytes, the SHA-256 of its content where it is in LFS or Xet, else its git blob id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: Annotated[int, Field(ge=0)]
    sha256: str | None
    blob_id: str


class Provenance(BaseModel):
    """`.ferry_provenance.json`: where the files of a directory came from. Times are UTC in ISO 8601.

    modified: as of HfRecord, of every file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str
    revision: str
    commit: Commit
    endpoint: str
    files: list[RemoteFile]
    modified: dict[str, int]
    started: str
    finished: str
    huggingface_hub: str
    ferry: str


class HfRecord(BaseModel):
    """`.ferry_record.json`: which run wrote a Hugging Face checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ferry_version: str
    fingerprint: str
    identity: dict[str, str]
    origin: Origin
    modified: dict[str, int]
    """When each weight file was written last, in nanoseconds since 1970. A file that has another time now has been
    changed, or was put there by something else, such as git, that also put this record there."""


class SourceDtypes(BaseModel):
    """The dtype of each tensor of the source, by the name that an export writes.

    Attributes:
        rest: The dtype of every tensor that is not named.
        named: The names of the others by dtype; `*` in a name stands for any number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rest: str
    named: dict[str, list[str]] = {}

    @classmethod
    def of_tensors(cls, dtypes: Mapping[str, str]) -> SourceDtypes | None:
        """Returns the short form of dtypes by name; None if there are no tensors."""
        if not dtypes:
            return None
        rest = Counter(dtypes.values()).most_common(1)[0][0]
        alike: dict[str, set[str]] = {}
        for name, dtype in dtypes.items():
            alike.setdefault(_any_number(name), set()).add(dtype)
        named: dict[str, dict[str, None]] = {}
        for name, dtype in dtypes.items():
            if dtype != rest:
                pattern = _any_number(name)
                named.setdefault(dtype, {})[pattern if len(alike[pattern]) == 1 else name] = None
        return cls(rest=rest, named={dtype: list(names) for dtype, names in named.items()})

    def by_name(self) -> Callable[[str], str]:
        """Returns a function from a tensor's name to its dtype."""
        known = {name: dtype for dtype, names in self.named.items() for name in names}
        return lambda name: known.get(name) or known.get(_any_number(name)) or self.rest


def _any_number(name: str) -> str:
    return ".".join("*" if word.isdecimal() else word for word in name.split("."))


class CheckpointRecord(BaseModel):
    """`ferry.json` of a converted checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ferry_version: str
    fingerprint: str
    identity: dict[str, str]
    """What the fingerprint is computed from. A later run is compared with it key by key."""
    family: str
    model_name: str
    origin: Origin
    target: Target
    arrays: int
    bytes_in: int
    bytes_out: int
    exact: bool
    """Whether every op is exact at this save dtype, so that a round trip restores the source's bits."""
    origin_fingerprint: Annotated[str | None, Field(exclude_if=lambda fingerprint: fingerprint is None)] = None
    """If the source is Ferry's bf16 copy: the fingerprint of converting the original directly. Both conversions are
    published under the same name."""
    dropped: list[str] = []
    """Source tensors that a named rule left out, one line for each rule."""
    source_dtypes: Annotated[SourceDtypes | None, Field(exclude_if=lambda dtypes: dtypes is None)] = None
    """The dtypes that an export writes; None in older records."""
    maxtext_settings: Annotated[dict[str, Any], Field(exclude_if=lambda settings: not settings)] = {}
    """What a MaxText run has to pass: `model_name`, and what MaxText's file of that name has otherwise."""
    maxtext_differs: Annotated[str, Field(exclude_if=lambda reason: not reason)] = ""
    """What MaxText's model computes otherwise than the original whatever is passed, in words."""


def record_in(read: Callable[[str], bytes | None], where: str) -> CheckpointRecord | None:
    """Reads the record of the checkpoint in a destination.

    Args:
        read: Returns the content of a file by its name in DST, or None if there is no such file.
        where: DST, for error messages.

    Returns:
        The record, for a published checkpoint from its provenance; None if there is none.

    Raises:
        BadInput: The file is not a record of this version.
    """
    if (content := read(RECORD_NAME)) is not None:
        return parsed(CheckpointRecord, content, f"{where}/{RECORD_NAME}", "checkpoint record")
    if (content := read(PROVENANCE_NAME)) is not None:
        return parsed(PublishedRecord, content, f"{where}/{PROVENANCE_NAME}", "checkpoint's provenance").record
    return None


class PublishedRecord(BaseModel):
    """The part of a published checkpoint's `provenance.json` that is read here."""

    model_config = ConfigDict(frozen=True)

    record: CheckpointRecord | None = None
