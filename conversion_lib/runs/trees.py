"""The files that each kind of conversion commits at a destination."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conversion_lib.record import (
    COMMIT_NAME,
    HF_DIR_NAME,
    HF_RECORD_NAME,
    MAXTEXT_MODELS_NAME,
    MAXTEXT_SETTINGS_NAME,
    ON_THE_FLY_LEASE,
    RECORD_NAME,
    REPORT_DIR_NAME,
    STEP_NAME,
    WORK_NAME,
)
from conversion_lib.runs.note import RUN_NAME
from conversion_lib.storage.interface import Staging, Tree
from conversion_lib.storage.local import RenameStaging
from conversion_lib.storage.locations import local_path, location

MAXTEXT = Tree(
    final=STEP_NAME,
    record=RECORD_NAME,
    work=WORK_NAME,
    build=STEP_NAME,
    beside=(HF_DIR_NAME, RECORD_NAME),
    dropped=(REPORT_DIR_NAME,),
    markers=(f"{STEP_NAME}/{COMMIT_NAME}", f"{STEP_NAME}/items/{COMMIT_NAME}"),
    notes=(f"{WORK_NAME}/{RUN_NAME}",),
    guests=(ON_THE_FLY_LEASE,),
)
"""A MaxText checkpoint at DST."""

SETTINGS = (MAXTEXT_SETTINGS_NAME, MAXTEXT_MODELS_NAME)
"""Only where the destination is the checkpoint's own: elsewhere a folder of that name may be anybody's."""


def maxtext_staging(destination: Path | str, *, alone: bool = True) -> Staging:
    """Returns the staging of a MaxText checkpoint.

    Args:
        destination: A directory or gs://bucket/prefix.
        alone: Whether the destination is for the checkpoint alone. Other files there are then refused.

    Raises:
        BadInput: `destination` is another kind of URL.
    """
    beside = (*SETTINGS, *MAXTEXT.beside) if alone else MAXTEXT.beside
    return location(destination).staging(replace(MAXTEXT, alone=alone, beside=beside))


def hf_staging(destination: Path) -> RenameStaging:
    """Returns the staging of a Hugging Face checkpoint, which becomes the directory `destination` itself.

    Raises:
        BadInput: `destination` is a URL.
    """
    final = local_path(destination, "a directory").absolute()
    work = f".{final.name}.ferry"
    record = f"{final.name}/{HF_RECORD_NAME}"
    return RenameStaging(final.parent, Tree(final.name, record, work, build="build", alone=False))


def begun_stagings(destination: str) -> list[Staging]:
    """Returns the stagings of every kind of run that may have been left at `destination`, a directory or URL.

    Raises:
        BadInput: `destination` is another URL than gs://bucket/prefix.
    """
    found: list[Staging] = [maxtext_staging(destination)]
    return found if location(destination).local is None else [*found, hf_staging(Path(destination))]
