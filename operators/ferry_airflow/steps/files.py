"""Which runs work in a working directory, and what of it is removed when one has ended."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.storage.files import disk_error, one_at_a_time, write_atomically
from ferry_airflow.choices import KEEP, REMOVE
from ferry_airflow.layout import DEQUANTIZED, DOWNLOADED, RUNS, file_name


def begin(work_dir: Path, run: str, target: str, reporter: Reporter) -> None:
    """Notes that a run works in `work_dir` and writes the target of that name: clean_up leaves it alone until then.

    Raises BadInput or OutsideFailure where the disk takes nothing.
    """
    try:
        with _runs(work_dir, reporter) as runs:
            write_atomically(runs / file_name(run), target.encode())
    except OSError as error:
        raise disk_error(error, f"cannot write to {work_dir}") from error


def clean_up(
    work_dir: Path, run: str, target: str, *, keep: str, succeeded: bool, reporter: Reporter
) -> dict[str, Any]:
    """Removes what `run` left in `work_dir`, but nothing that another run works with; `removed` and `bytes_freed`.

    keep: one of POLICIES in ferry_airflow.choices. A run that failed and keeps its files counts as working: it may be
    tried again.
    """
    removed, freed = [], 0
    if work_dir.is_dir() and (succeeded or keep == REMOVE):
        with _runs(work_dir, reporter) as runs:
            (runs / file_name(run)).unlink(missing_ok=True)
            others = {path.read_text() for path in runs.iterdir() if not path.name.startswith(".")}
            for path in _not_needed(work_dir, target, keep, others):
                freed += used_bytes(path)
                shutil.rmtree(path)
                removed.append(str(path))
                reporter.say(f"removed {path}")
        if not any(path for path in work_dir.iterdir() if path.name != RUNS):
            shutil.rmtree(work_dir)
    reporter.say(f"{format_bytes(freed)} freed; {format_bytes(used_bytes(work_dir))} stay in {work_dir}")
    return {"removed": removed, "bytes_freed": freed}


def used_bytes(directory: Path) -> int:
    """What the files in and below a directory take on disk; 0 where there is none."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _not_needed(work_dir: Path, target: str, keep: str, others: set[str]) -> list[Path]:
    """Existing directories that go: the run's own target, and what is shared once nobody else works here."""
    names = [] if keep == KEEP else [target]
    if keep != KEEP and not others:
        names += [DEQUANTIZED, f".{DEQUANTIZED}.ferry"]
    if keep == REMOVE and not others:
        names.append(DOWNLOADED)
    return [work_dir / name for name in names if name not in others and (work_dir / name).is_dir()]


@contextmanager
def _runs(work_dir: Path, reporter: Reporter) -> Iterator[Path]:
    """The directory in which each run has a file with its target's name, held while it is looked at or changed."""
    runs = work_dir / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(work_dir / f"{RUNS}.lock", lambda: reporter.say(f"waiting for another run in {work_dir}")):
        yield runs
