"""Which runs use a working directory, and what is removed from it when a run has ended."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conversion_lib.errors import BadInput
from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.record import REPORT_DIR_NAME
from conversion_lib.runs.trees import hf_staging, maxtext_staging
from conversion_lib.runs.workspace import exclusively
from conversion_lib.storage.files import disk_error, one_at_a_time, write_atomically
from conversion_lib.storage.names import safe_part
from ferry_airflow.choices import KEEP, OVERWRITE, REMOVE
from ferry_airflow.layout import DEQUANTIZED, DOWNLOADED, RUNS, file_name, note_of


def begin(work_dir: Path, run: str, target: str, reporter: Reporter) -> None:
    """Registers a run in a working directory. Until its own clean_up, that of other runs keeps what it uses.

    Args:
        work_dir: The working directory of the run's source.
        run: The run's id.
        target: The name of the target that the run writes.
        reporter: Says if another run holds the directory.

    Raises:
        BadInput: The directory cannot be written.
        OutsideFailure: The disk is full or broken.
    """
    try:
        with _runs(work_dir, reporter) as runs:
            write_atomically(runs / file_name(run), target.encode())
    except OSError as error:
        raise disk_error(error, f"cannot write to {work_dir}") from error


def clean_up(
    work_dir: Path, run: str, target: str, *, keep: str, succeeded: bool, reporter: Reporter
) -> dict[str, Any]:
    """Removes a run's files from a working directory, but nothing that another run uses.

    Args:
        work_dir: The working directory of the run's source.
        run: The run's id.
        target: The name of the target that the run wrote.
        keep: One of POLICIES in ferry_airflow.choices.
        succeeded: Whether the run succeeded. A failed run that keeps its files stays registered, for a retry.
        reporter: Says what is removed and what stays.

    Returns:
        `removed`, the paths of directories, and `bytes_freed`.
    """
    removed, freed = [], 0
    if work_dir.is_dir() and (succeeded or keep == REMOVE):
        with _runs(work_dir, reporter) as runs:
            (runs / file_name(run)).unlink(missing_ok=True)
            others = {path.read_text(errors="replace") for path in runs.iterdir() if not path.name.startswith(".")}
            for path in _not_needed(work_dir, target, keep, others):
                if path.is_symlink():
                    raise BadInput(f"{path} is a symbolic link among ferry's own files: remove it")
                freed += used_bytes(path)
                _remove(path)
                removed.append(str(path))
                reporter.say(f"removed {path}")
        if not any(path for path in work_dir.iterdir() if path.name != RUNS):
            shutil.rmtree(work_dir)
    reporter.say(f"{format_bytes(freed)} freed; {format_bytes(used_bytes(work_dir))} stay in {work_dir}")
    return {"removed": removed, "bytes_freed": freed}


def forget(work_dir: Path, run: str, target: str, stage: str, reporter: Reporter) -> None:
    """Removes what a stage and those after it made earlier.

    Args:
        work_dir: The working directory of the run's source.
        run: The run's id.
        target: The name of the target that the run writes.
        stage: One of OVERWRITE in ferry_airflow.choices.
        reporter: Says what is removed.

    Raises:
        BadInput: Another run uses what is to be removed.
        OutsideFailure: Another run is at work there.
    """
    step = list(OVERWRITE).index(stage)
    names = [DOWNLOADED, DEQUANTIZED, target, f"{target}/{REPORT_DIR_NAME}"][step:]
    with _runs(work_dir, reporter) as runs:
        others = [path for path in runs.iterdir() if path.name not in (".lock", file_name(run))]
        shared = [path for path in others if step < 2 or path.read_text() == target]
        if shared:
            who = ", ".join(sorted(path.name for path in shared))
            raise BadInput(
                f"overwrite={stage} would remove files in {work_dir} that other runs use: {who}. Let them succeed, "
                f"or, if they are given up, remove the files of their names in {runs}"
            )
        for path in (work_dir / name for name in names):
            if path.is_dir():
                if path.name in (DEQUANTIZED, target):
                    staging = hf_staging(path) if path.name == DEQUANTIZED else maxtext_staging(path)
                    with exclusively(staging):  # nobody is at work there; who may begin was looked for above
                        staging.clear()
                _remove(path)
                reporter.say(f"overwrite={stage}: removed {path}")


def used_bytes(directory: Path) -> int:
    """Returns the bytes on disk of the files in and below a directory; 0 if it does not exist."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _not_needed(work_dir: Path, target: str, keep: str, others: set[str]) -> list[Path]:
    """The existing directories to remove: the run's own target, and, if no other run works here, the shared ones."""
    names = [] if keep == KEEP else [safe_part(target, work_dir)]
    if keep != KEEP and not others:
        names += [DEQUANTIZED, f".{DEQUANTIZED}.ferry"]
    if keep == REMOVE and not others:
        names.append(DOWNLOADED)
    return [work_dir / name for name in names if name not in others and (work_dir / name).is_dir()]


def _remove(path: Path) -> None:
    note_of(path).unlink(missing_ok=True)
    shutil.rmtree(path)


@contextmanager
def _runs(work_dir: Path, reporter: Reporter) -> Iterator[Path]:
    """The directory with one file for each run, which contains its target's name. Locked while in use."""
    runs = work_dir / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(work_dir / f"{RUNS}.lock", lambda: reporter.say(f"waiting for another run in {work_dir}")):
        yield runs
