"""A MaxText checkpoint in a bucket, for what reads one in a directory: its small files lie here, its arrays there.

The mirror of gs://bucket/DST is a temporary directory with Ferry's record, the last check, `hf/` and Orbax's metadata
under the names that they have there. A note in it says of what it is the mirror; whoever opens an array, or asks what
the files are, goes by `stored_at`.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.record import (
    CHECK_NAME,
    COMMIT_NAME,
    HF_DIR_NAME,
    PROVENANCE_NAME,
    RECORD_NAME,
    REPORT_DIR_NAME,
    REPORT_PAGE_NAME,
)
from conversion_lib.sources.orbax import MANIFEST, METADATA, PARTS, STEP_METADATA
from conversion_lib.storage.files import in_parallel
from conversion_lib.storage.gcs import MIRROR_NOTE, REQUESTS, BucketLocation

STEP = "0"
STEP_FILES = (STEP_METADATA, COMMIT_NAME)
ITEMS_FILES = (METADATA, MANIFEST)
REPORT = (f"{REPORT_DIR_NAME}/{CHECK_NAME}", f"{REPORT_DIR_NAME}/{REPORT_PAGE_NAME}")


def items_in(place: BucketLocation) -> str | None:
    """The path from `place` to the `items` of the Orbax checkpoint at DST, DST/0 or DST/0/items, if there is one."""
    for path in PARTS:
        alone = not path.startswith(STEP) or _steps(place) == [0]  # else it is a training run's directory
        if alone and (place / path / METADATA).read() is not None:
            return path
    return None


def _steps(place: BucketLocation) -> list[int]:
    return sorted(int(name) for name in place.children() if name.isdigit())


@contextmanager
def mirrored(url: str) -> Iterator[Path]:
    """A directory that stands for the MaxText checkpoint at gs://bucket/DST, DST/0 or DST/0/items.

    What is raised meanwhile names the bucket. A report that a check leaves in it is brought to the bucket at the end.
    Raises BadInput where there is no Orbax checkpoint, and where there are several: a training run's directory.
    """
    place = BucketLocation.parse(url)
    items = items_in(place)
    if items is None:
        raise BadInput(f"{url} holds no Orbax checkpoint: {_instead(place)}")
    root, below = _split(place, items)
    with tempfile.TemporaryDirectory(prefix="ferry-mirror-") as directory:
        mirror = Path(directory) / (root.name.rpartition("/")[2] or root.bucket)
        try:
            _fetch(root, mirror, below)
            before = _contents(mirror)
            path = mirror / place.name.removeprefix(root.name).strip("/")
            yield path
            _bring_back(root, mirror, before)
        except (BadInput, OutsideFailure) as error:  # nobody can look at the mirror afterwards
            kind = BadInput if isinstance(error, BadInput) else OutsideFailure
            raise kind(str(error).replace(str(mirror), str(root))) from error


def _instead(place: BucketLocation) -> str:
    """What there is where a checkpoint is not."""
    if (steps := _steps(place)) and items_in(place / str(steps[-1])) is not None:
        named = ", ".join(map(str, steps))
        return f"it is a training run's, of steps {named}; name one, such as {place / str(steps[-1])}"
    return f"no {METADATA} in it, in items/ or in 0/items/"


def _split(place: BucketLocation, items: str) -> tuple[BucketLocation, str]:
    """DST, and the path from it to its `items`."""
    whole = (place / items).name
    for below in ("0/items", "items"):
        if whole == below or whole.endswith(f"/{below}"):
            name = whole.removesuffix(below).rstrip("/")
            return BucketLocation(place.bucket, name, place.client), below
    return place / items, ""


def _fetch(root: BucketLocation, mirror: Path, below: str) -> None:
    """Fills the mirror, its note first."""
    mirror.mkdir()
    (mirror / MIRROR_NOTE).write_text(str(root))
    step = below.rpartition("/")[0]
    wanted = [RECORD_NAME, PROVENANCE_NAME, *REPORT]
    wanted += [f"{HF_DIR_NAME}/{name}" for name in (root / HF_DIR_NAME).below()]
    wanted += [f"{step}/{name}".lstrip("/") for name in (STEP_FILES if below else ())]
    wanted += [f"{below}/{name}".lstrip("/") for name in ITEMS_FILES]

    def fetch(path: str, stopped: threading.Event) -> None:
        if (content := (root / path).read()) is not None:
            (mirror / path).parent.mkdir(parents=True, exist_ok=True)
            (mirror / path).write_bytes(content)

    in_parallel(fetch, wanted, threads=REQUESTS)


def _contents(mirror: Path) -> dict[str, bytes]:
    return {path: (mirror / path).read_bytes() for path in REPORT if (mirror / path).is_file()}


def _bring_back(root: BucketLocation, mirror: Path, before: dict[str, bytes]) -> None:
    """Writes the report to the bucket where it is another than before; the verdict last, as `ferry check` does."""
    try:
        for path, content in reversed(_contents(mirror).items()):
            if content != before.get(path):
                (root / path).write(content)
    except (BadInput, OutsideFailure) as error:
        raise type(error)(f"{error}; the report is lost: `--report DIR` leaves it in a directory") from error
