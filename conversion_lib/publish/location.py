"""The location of a published checkpoint, `<model>/<commit>/<target>` under a base, and the marker that commits it.

These names are defined only here. Publishing, reading and removing use this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conversion_lib.errors import BadInput
from conversion_lib.publish.destinations.base import LEVELS, MARKER_NAME, Destination
from conversion_lib.record import CheckpointRecord, Origin, Time, parsed
from conversion_lib.storage.names import is_hidden, safe_part, shown

FINGERPRINT_DIGITS = 12
"""Digits of a fingerprint that is used in place of a commit."""
POINTER_PREFIX = "latest-"
"""Start of the names of the files beside a model's commits."""


@dataclass(frozen=True, slots=True)
class PublishedPath:
    """`<model>/<commit>/<target>`. Its text is the path relative to the base, the URL given to `ferry publish`."""

    model: str
    commit: str
    target: str

    def __post_init__(self) -> None:
        """Raises BadInput where a level would be no directory of its own, or one that Ferry keeps for itself."""
        for what, level in (("model", self.model), ("commit", self.commit), ("target", self.target)):
            if is_hidden(safe_part(level, f"the {what} to publish")) or level.startswith(POINTER_PREFIX):
                raise BadInput(f"the {what} to publish has the name {shown(level)}, which ferry keeps for itself")

    @classmethod
    def of_record(cls, record: CheckpointRecord) -> PublishedPath:
        """Returns the path at which a checkpoint with this record is published."""
        fingerprint = record.origin_fingerprint or record.fingerprint
        return cls(record.model_name, commit_level(record.origin, fingerprint), record.target.slug)

    @classmethod
    def parse(cls, path: str) -> PublishedPath:
        """Returns the last three levels of a path or a URL.

        Raises:
            BadInput: There are fewer levels.
        """
        levels = path.rstrip("/").rsplit("/", LEVELS)[-LEVELS:]
        if len(levels) < LEVELS or not all(levels):
            raise BadInput(f"{path} is not a published location: expected URL/<model>/<commit>/<target>")
        return cls(*levels)

    def __str__(self) -> str:
        return f"{self.model}/{self.below_model}"

    @property
    def below_model(self) -> str:
        """`<commit>/<target>`, as the `latest` pointer names it."""
        return f"{self.commit}/{self.target}"

    @property
    def pointer(self) -> str:
        """The file beside a model's commits that names the commit published last for this target."""
        return f"{self.model}/{POINTER_PREFIX}{self.target}.json"

    def model_url(self, url: str) -> str:
        """Returns `<base>/<model>`, given this location's full URL."""
        return url.rstrip("/").removesuffix(f"/{self.below_model}")


def commit_level(origin: Origin, fingerprint: str) -> str:
    """Returns the second level: the commit, or for weights without one, `local-` and digits of the fingerprint.

    Args:
        origin: Where the weights came from.
        fingerprint: Of the conversion of the original, also if the source was a bf16 copy of it.
    """
    return origin.commit or f"local-{fingerprint.removeprefix('sha256:')[:FINGERPRINT_DIGITS]}"


class Marker(BaseModel):
    """`ferry_commit.json`.

    Attributes:
        digest: The checkpoint's, `sha256:<hex>`.
        checked: Whether it was published with a passing verdict.
        manifest_crc32c: Of manifest.json's bytes, in base64.
        published: UTC in ISO 8601.
        ferry: Ferry's version.
        model: What MaxText's model computes otherwise than the original, and by how much; empty if nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    checked: bool
    manifest_crc32c: str
    published: Time
    ferry: str
    model: Annotated[str, Field(exclude_if=lambda line: not line)] = ""


class Latest(BaseModel):
    """`latest-<target>.json` of a model. `location` is `<commit>/<target>`; the rest is copied from its marker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    digest: str
    checked: bool
    published: Time


def parse_marker(content: bytes) -> Marker | None:
    """Returns the marker in these bytes, or None if they are not a marker of this version."""
    try:
        return Marker.model_validate_json(content)
    except ValidationError:
        return None


def read_marker(destination: Destination) -> Marker | None:
    """Reads the marker of a location; None if nothing is published there.

    Raises:
        BadInput: The marker is of another version.
        OutsideFailure: The disk or the service failed.
    """
    content = destination.read(MARKER_NAME)
    return None if content is None else parsed(Marker, content, f"{destination.url}/{MARKER_NAME}", "marker")


def read_latest(base: Destination, path: PublishedPath) -> PublishedPath | None:
    """Returns the location that the `latest` pointer of a model and target names; None if there is no pointer.

    Args:
        base: The destination given to `ferry publish`.
        path: Any location of the model and target.

    Raises:
        BadInput: The pointer is of another version.
        OutsideFailure: The disk or the service failed.
    """
    content = base.read(path.pointer)
    if content is None:
        return None
    named = parsed(Latest, content, f"{base.url}/{path.pointer}", "pointer")
    return PublishedPath.parse(f"{path.model}/{named.location}")
