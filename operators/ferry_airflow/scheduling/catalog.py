"""The catalogue of `scheduled_onboarding`: which models are watched, and to which targets they are converted.

    schedule: "0 3 * * *"            # cron, a preset such as @daily, or null: only when triggered
    at_most: 2                       # onboardings at once
    defaults:                        # of every model below; a model's own value replaces it
      destination: gs://bucket/models
    models:
      - repo: Qwen/Qwen3-0.6B
        revision: {branch: main}     # or {tag: "v*"}: the newest matching tag; or {commit: <40 hex digits>}
        targets: [{scan_layers: true}, {scan_layers: false}]

Each entry is validated by itself. A wrong one is reported with its line, and the others apply.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from croniter import croniter  # type: ignore[import-untyped]
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from conversion_lib.core.documents import read_limited
from conversion_lib.errors import BadInput
from conversion_lib.limits import YAML_BYTES
from conversion_lib.models.catalog import model_named, published_name
from conversion_lib.record import CHOSEN_FIELDS, Target
from ferry_airflow.choices import DequantizeMode
from ferry_airflow.scheduling.lines import Document, parse

CATALOG_VARIABLE = "FERRY_CATALOG"
DESTINATION_VARIABLE = "FERRY_DESTINATION"
PRESETS = ("@hourly", "@daily", "@weekly", "@monthly", "@yearly")
SCHEDULE, AT_MOST = "@daily", 2


def _known_model(name: str) -> str:
    try:
        return model_named(name).name
    except BadInput as error:
        raise ValueError(str(error)) from error


def _cron(schedule: str) -> str:
    if schedule not in PRESETS and not croniter.is_valid(schedule):
        raise ValueError(f"expected a cron expression or one of {', '.join(PRESETS)}")
    return schedule


def _number(value: Any) -> Any:
    """YAML reads `1e-5` as a string, since it has no point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Revision(_Strict):
    """Which commit of a repository to onboard: a branch's head, the newest matching tag, or one commit.

    Attributes:
        tag: A pattern with `*` and `?`, such as `v*`.
        commit: 40 hex digits.
    """

    branch: Annotated[str, Field(min_length=1)] | None = None
    tag: Annotated[str, Field(min_length=1)] | None = None
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.branch, self.tag, self.commit)) != 1:
            raise ValueError("expected one of branch, tag and commit")
        return self

    def __str__(self) -> str:
        return next(f"{name} {value}" for name, value in self if value is not None)


class _Choice(_Strict):
    """The part of a Target that a run of `onboard_checkpoint` chooses."""

    @property
    def slug(self) -> str:
        """The target's name in a published path."""
        return Target(**self.model_dump()).slug


if TYPE_CHECKING:
    TargetChoice = Target
else:
    TargetChoice = create_model(
        "TargetChoice",
        __base__=_Choice,
        **{name: (Target.model_fields[name].annotation, Target.model_fields[name].default) for name in CHOSEN_FIELDS},
    )


class Entry(_Strict):
    """One model of the catalogue. The fields after `targets` are params of `onboard_checkpoint`."""

    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*$")]
    model_name: Annotated[str, AfterValidator(_known_model)] | None = None
    revision: Revision = Revision(branch="main")
    targets: Annotated[list[TargetChoice], Field(min_length=1)] = [TargetChoice()]
    destination: Annotated[str, Field(pattern="^(gs://[^/]+|/.).*$")]
    dequantize: DequantizeMode | None = None
    parts: Annotated[int, Field(ge=1)] | None = None
    max_kl: Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)] | None = None
    max_model_kl: Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)] | None = None
    approval: bool | None = None

    @property
    def published_as(self) -> str:
        """The first level of the published path."""
        return published_name(self.repo, self.repo)

    def conf(self, commit: str, target: TargetChoice) -> dict[str, Any]:
        """Returns the conf of a run of `onboard_checkpoint`. The DAG's defaults apply to what the entry leaves out."""
        chosen = self.model_dump(exclude={"revision", "targets"}, exclude_none=True)
        return {**chosen, **target.model_dump(), "revision": commit}


class _Settings(_Strict):
    schedule: Annotated[str, AfterValidator(_cron)] | None = SCHEDULE
    at_most: Annotated[int, Field(ge=1)] = AT_MOST
    defaults: dict[str, Any] = {}
    models: list[Any]


@dataclass(frozen=True)
class Catalog:
    """The valid part of a catalogue, and its problems.

    Attributes:
        schedule: A cron expression or a preset. None: only when triggered.
        at_most: Maximum number of onboardings at once.
        problems: One line for each problem, with the line of the file.
    """

    schedule: str | None
    at_most: int
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]


def catalog_path(default: Path) -> Path:
    """Returns the path that FERRY_CATALOG names, or else `default`."""
    return Path(os.environ.get(CATALOG_VARIABLE) or default)


def load_catalog(path: Path) -> Catalog:
    """Reads the catalogue at `path`. The default destination is FERRY_DESTINATION.

    Raises:
        BadInput: The file cannot be read, is not YAML, or is wrong outside its models. The message names the line.
    """
    try:
        document = parse(read_limited(path, YAML_BYTES), path.name)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        settings = _Settings.model_validate(document.data)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(_problem(path, document, first["loc"], first)) from error
    unknown = sorted(settings.defaults.keys() - Entry.model_fields.keys())
    if unknown or "repo" in settings.defaults:
        name = unknown[0] if unknown else "repo"
        line = document.line(("defaults", name))
        raise BadInput(f"{path.name}, line {line}: defaults.{name} cannot be a default of models")
    entries: dict[int, Entry] = {}
    problems: list[str] = []
    for index, own in enumerate(settings.models):
        found = _entry(path, document, settings.defaults, index, own)
        if isinstance(found, Entry) and (repeated := _repeated(path, document, entries, index, found)):
            problems.append(repeated)
        elif isinstance(found, Entry):
            entries[index] = found
        else:
            problems += [problem for problem in found if problem not in problems]  # a wrong default: once for all
    return Catalog(settings.schedule, settings.at_most, tuple(entries.values()), tuple(problems))


def _entry(path: Path, document: Document, defaults: Mapping[str, Any], index: int, own: Any) -> Entry | list[str]:
    if not isinstance(own, dict):
        return [f"{path.name}, line {document.line(('models', index))}: expected a model with a repo"]
    fallback = {"destination": value} if (value := os.environ.get(DESTINATION_VARIABLE)) else {}
    try:
        return Entry.model_validate({**fallback, **defaults, **own})
    except ValidationError as error:
        problems = []
        for one in error.errors():
            # a value that the entry does not have is in the defaults, or missing
            named = bool(one["loc"]) and one["loc"][0] in defaults and one["loc"][0] not in own
            at = ("defaults", *one["loc"]) if named else ("models", index, *one["loc"])
            problems.append(_problem(path, document, at, one))
        return problems


def _repeated(path: Path, document: Document, entries: Mapping[int, Entry], index: int, entry: Entry) -> str | None:
    """The problem of an entry that repeats a target of an earlier entry; None if it repeats none."""

    def made(one: Entry) -> set[tuple[str, ...]]:
        return {(one.repo, str(one.revision), one.published_as, one.destination, t.slug) for t in one.targets}

    for before, other in entries.items():
        if both := made(entry) & made(other):
            first, line = document.line(("models", before)), document.line(("models", index))
            return f"{path.name}, line {line}: {entry.repo} as {min(both)[-1]} is already in line {first}"
    return None


def _problem(path: Path, document: Document, loc: tuple[str | int, ...], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "model"
    unknown = error["type"] == "extra_forbidden"
    message = "no such key" if unknown else str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    value = error["input"]
    shown = f"{value!r}: " if isinstance(value, str | int | float) and not unknown else ""
    return f"{path.name}, line {document.line(loc)}: {where}: {shown}{message}"
