"""Where a published checkpoint lies, `<model>/<commit>/<target>` under a base, and the marker that says it is there.

The one place that knows these names: whoever publishes, looks or removes asks here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib.errors import BadInput
from conversion_lib.publish.destinations.base import LEVELS, MARKER_NAME, Destination
from conversion_lib.record import CheckpointRecord, Origin

FINGERPRINT_DIGITS = 12
"""Of the fingerprint that stands for a commit."""


@dataclass(frozen=True, slots=True)
class PublishedPath:
    """`<model>/<commit>/<target>`; its text is the path, relative to the base that `ferry publish` was given."""

    model: str
    commit: str
    target: str

    @classmethod
    def of_record(cls, record: CheckpointRecord) -> PublishedPath:
        """Where a checkpoint with this record is published."""
        fingerprint = record.origin_fingerprint or record.fingerprint
        return cls(record.model_name, commit_level(record.origin, fingerprint), record.target.slug)

    @classmethod
    def parse(cls, path: str) -> PublishedPath:
        """The last three levels of a path or a URL. Raises BadInput where there are fewer."""
        levels = path.rstrip("/").rsplit("/", LEVELS)[-LEVELS:]
        if len(levels) < LEVELS or not all(levels):
            raise BadInput(f"{path} is no published location: expected URL/<model>/<commit>/<target>")
        return cls(*levels)

    def __str__(self) -> str:
        return f"{self.model}/{self.below_model}"

    @property
    def below_model(self) -> str:
        """`<commit>/<target>`, as the `latest` pointer names it."""
        return f"{self.commit}/{self.target}"

    @property
    def pointer(self) -> str:
        """The file beside a model's commits that names the one published last for this target."""
        return f"{self.model}/latest-{self.target}.json"

    def model_url(self, url: str) -> str:
        """`<base>/<model>`, where `url` is this location in full."""
        return url.rstrip("/").removesuffix(f"/{self.below_model}")


def commit_level(origin: Origin, fingerprint: str) -> str:
    """The second level; weights without a commit go by the fingerprint of the conversion of what they came from."""
    return origin.commit or f"local-{fingerprint.removeprefix('sha256:')[:FINGERPRINT_DIGITS]}"


class Marker(BaseModel):
    """`ferry_commit.json`. `manifest_crc32c` is of manifest.json's bytes; `published` is UTC in ISO 8601."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    checked: bool
    manifest_crc32c: str
    published: str
    ferry: str


class Latest(BaseModel):
    """`latest-<target>.json` of a model. `location` is relative to the file's directory: `<commit>/<target>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    digest: str
    checked: bool
    published: str


def parse_marker(content: bytes) -> Marker | None:
    """The marker in these bytes, None where they are none of this version."""
    try:
        return Marker.model_validate_json(content)
    except ValidationError:
        return None


def read_marker(destination: Destination) -> Marker | None:
    """The marker of a location; None where nothing is published there.

    Raises BadInput for a marker of another version.
    """
    content = destination.read(MARKER_NAME)
    if content is None:
        return None
    if (marker := parse_marker(content)) is None:
        raise BadInput(f"{destination.url}/{MARKER_NAME} is no marker of this version")
    return marker


def read_latest(base: Destination, path: PublishedPath) -> PublishedPath | None:
    """The location that the `latest` pointer of this model and target names; None where there is no pointer.

    Raises BadInput for a pointer of another version.
    """
    content = base.read(path.pointer)
    if content is None:
        return None
    try:
        location = Latest.model_validate_json(content).location
    except ValidationError as error:
        raise BadInput(
            f"{base.url}/{path.pointer} is no pointer of this version: publish again, or remove it"
        ) from error
    return PublishedPath.parse(f"{path.model}/{location}")
