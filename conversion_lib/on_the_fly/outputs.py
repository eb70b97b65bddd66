"""Where a training run's checkpoint is to lie, a directory or a prefix in a bucket, and who is at work there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from conversion_lib.errors import BadInput, FerryError
from conversion_lib.on_the_fly.claim import STALE_SECONDS, Claim, Note
from conversion_lib.record import COMMIT_NAME, CheckpointRecord, read_record
from conversion_lib.runs.bucket_workspace import BESIDE_CLAIM, BucketLayout
from conversion_lib.runs.layouts import layout_at
from conversion_lib.runs.locks import LOCK_NAME
from conversion_lib.runs.workspace import REPLACED_NAME
from conversion_lib.sources.orbax import METADATA, STEP_METADATA, open_orbax
from conversion_lib.storage.gcs import SCHEME, BucketLocation

WORK_NAME = ".ferry"
"""The work directory of a conversion; names in it that begin as its locks do are left alone."""


@dataclass(frozen=True)
class Foreign:
    """What its own metadata tell of a checkpoint that Ferry did not write; None: not told."""

    scan_layers: bool | None
    ocdbt: bool | None
    zarr3: bool | None
    dtypes: frozenset[str] | None


class RightToConvert(Protocol):
    """What one process of all that share an output holds."""

    @property
    def descriptor(self) -> int:
        """A file for the conversion to inherit; negative where there is none."""
        ...

    def take(self) -> bool: ...

    def read(self) -> Note | None: ...

    def release(self, *, failure: str | None = None, final: bool = False) -> None: ...


class DirectoryOutput:
    """A directory on storage that all hosts share."""

    def __init__(self, destination: Path) -> None:
        self.destination = str(destination)
        self.items: Path | str = destination / "0" / "items"
        self._step, self._work = destination / "0", destination / WORK_NAME

    def found(self) -> CheckpointRecord | Foreign | None:
        """The checkpoint that is whole here. Raises BadInput for a half-written one that is not Ferry's."""
        items = self._step / "items"
        if not items.is_dir():
            return None
        record = read_record(self._step)
        if record is not None:
            return record
        if (self._work / REPLACED_NAME).exists():
            return None  # its record has been taken away, and it is next
        if not (self._step / COMMIT_NAME).exists() and not (items / COMMIT_NAME).exists():
            raise BadInput(
                f"{items} is half-written, by something else than ferry: it has no {COMMIT_NAME}. Remove {self._step}, "
                "or give another directory"
            )
        source = open_orbax(items)
        dtypes = frozenset(info.dtype for path, info in source.tensors.items() if path.startswith("params/"))
        return Foreign(source.scan_layers, source.ocdbt, source.zarr3, dtypes)

    def claim(self, on_lost: Callable[[], None]) -> Claim:
        return Claim(self._work / f"{LOCK_NAME}-on-the-fly", on_lost)


class BucketOutput:
    """A prefix in a bucket."""

    def __init__(self, layout: BucketLayout) -> None:
        self._layout = layout
        self.destination = str(layout.root)
        self.items: Path | str = f"{layout.root}/0/items"

    def found(self) -> CheckpointRecord | Foreign | None:
        """The checkpoint that is whole here, as its marker tells."""
        record = self._layout.finished()
        step = self._layout.root / "0"
        if record is not None or (step / COMMIT_NAME).read() is None:
            return record
        tree, own = (json.loads((step / name).read() or b"{}") for name in (f"items/{METADATA}", STEP_METADATA))
        scan_layers = (own.get("custom_metadata") or {}).get("scan_layers")
        return Foreign(scan_layers, tree.get("use_ocdbt"), tree.get("use_zarr3"), None)

    def claim(self, on_lost: Callable[[], None]) -> BucketClaim:
        return BucketClaim(self._layout.root / BESIDE_CLAIM)


class BucketClaim:
    """A claim as an object that its holder rewrites. The conversion itself holds a second one while it writes."""

    descriptor = -1

    def __init__(self, place: BucketLocation) -> None:
        self._place = place
        self._held: ExitStack | None = None
        self._watched = (0, 0.0)

    def read(self) -> Note | None:
        """How the last holder's work failed; None while somebody holds the claim, and where nobody ever did."""
        try:
            return Note.model_validate_json(self._place.read() or b"")
        except ValidationError:
            return None

    def take(self) -> bool:
        """Takes the claim where nobody holds it, or its holder has stood still, and says whether."""
        from conversion_lib.runs.bucket_locks import RunClaim
        from conversion_lib.storage.gcs_client import RETRY, explained

        blob: Any = self._place.blob
        with explained(str(self._place), "claim the place"):
            there = blob.bucket.get_blob(blob.name, retry=RETRY)
            generation = int(there.generation) if there else 0
            if generation != self._watched[0]:
                self._watched = (generation, time.monotonic())
            is_new = time.monotonic() - self._watched[1] < STALE_SECONDS
            if generation and is_new and self.read() is None:
                return False
            claim = RunClaim(blob)
            taken = claim.take_over(generation)
        if taken:
            self._held = ExitStack()
            self._held.enter_context(claim.kept_alive())
        return taken

    def release(self, *, failure: str | None = None, final: bool = False) -> None:
        """Lets go of the claim. failure: left in its place for those that wait."""
        if self._held is None:
            return
        self._held.close()
        self._held = None
        if failure is not None:
            note = Note.of_this_process("", failure, final)
            with suppress(FerryError):  # what failed is what is to be told
                self._place.write_first(note.model_dump_json().encode())


def output_at(destination: str | Path) -> DirectoryOutput | BucketOutput:
    """Where MaxText's `base_output_directory` is. Raises BadInput for a URL other than gs://bucket/prefix."""
    text = str(destination)
    if "://" in text and not text.startswith(SCHEME):
        raise BadInput(f"{text}: give a directory or gs://bucket/prefix")
    layout = layout_at(text)
    if isinstance(layout, BucketLayout):
        return BucketOutput(layout)
    return DirectoryOutput(Path(text).expanduser().absolute())
