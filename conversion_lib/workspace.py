"""Where a run builds what it writes, and what it finds at its destination.

Everything is built in a hidden sibling of what it will become, on the same file system, and renamed at the end. So
a reader sees nothing or the whole, and a killed run leaves its journal and its data where the next one looks.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.files import disk_error, existing_parent, sync_directory, write_atomically
from conversion_lib.progress import format_bytes

RUN_NAME = "run.json"
JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = "lock"


@dataclass(frozen=True)
class Layout:
    """The paths of one destination.

    final: what appears when the run commits.
    work: the hidden directory of the run; `build` in it becomes `final`.
    record: where the finished run's fingerprint is read from.
    ours: names beside `final` that a run may leave there; anything else in that directory is somebody else's.
    """

    final: Path
    work: Path
    build: Path
    record: Path
    ours: frozenset[str] | None = None


class Workspace:
    """One run's place. Use as a context manager: it holds a lock against a second run at the same destination."""

    def __init__(self, layout: Layout, identity: dict[str, str], *, overwrite: bool = False) -> None:
        self.layout, self._identity, self._overwrite = layout, identity, overwrite
        self._lock: int | None = None

    @property
    def journal(self) -> Path:
        return self.layout.work / JOURNAL_NAME

    def finished(self) -> bool:
        """True where the very same run has been finished here.

        Raises BadInput where the destination holds anything else, unless it may be overwritten.
        """
        layout = self.layout
        _refuse_strangers(layout)
        if self._overwrite:
            return False
        if layout.final.exists() and not _is_empty(layout.final):
            held = _identity_in(layout.record)
            if held is None:
                raise BadInput(f"{layout.final} is there already and was not written by ferry; --overwrite replaces it")
            self._refuse_difference(held, f"{layout.final} is there already, from another run")
            return True
        return False

    def __enter__(self) -> Workspace:
        """Takes the lock and prepares the work directory: resumes an unfinished run, or begins one.

        Raises BadInput where an unfinished run of another source, target or version is there.
        """
        work = self.layout.work
        _make_directory(work)
        self._take_lock()
        unfinished = _identity_in(work / RUN_NAME)
        if unfinished is not None and not self._overwrite:
            self._refuse_difference(unfinished, f"{work} holds an unfinished run")
        else:
            self._clear()
        write_atomically(work / RUN_NAME, json.dumps({"identity": self._identity}).encode())
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def commit(self, finish: Callable[[], None]) -> None:
        """Renames what was built to where it belongs, and removes the work directory.

        finish: writes the record and what goes with it. It runs when what is replaced is out of the way and the new
        is not there yet, so that a record never stands beside another run's data.
        """
        layout = self.layout
        if layout.final.exists():
            if not self._overwrite and not _is_empty(layout.final):
                raise BadInput(f"{layout.final} appeared while this run was under way")
            layout.final.rename(layout.work / "replaced")
        finish()
        layout.build.rename(layout.final)
        sync_directory(layout.final.parent)
        shutil.rmtree(layout.work, ignore_errors=True)

    def abandon(self) -> None:
        """Removes the work directory: what is in it came from input that turned out bad."""
        shutil.rmtree(self.layout.work, ignore_errors=True)

    def _refuse_difference(self, held: dict[str, str], what: str) -> None:
        there, here = _flat(held), _flat(self._identity)
        parts = [
            f"{key}: {there.get(key)} there, {here.get(key)} here"
            for key in sorted({*there, *here})
            if there.get(key) != here.get(key)
        ]
        if parts:
            raise BadInput(f"{what}; it differs in {'; '.join(parts)}. --overwrite starts anew")

    def _take_lock(self) -> None:
        path = self.layout.work / LOCK_NAME
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise OutsideFailure(f"another run is at work in {self.layout.work}; wait for it to end") from None
        except OSError:
            return  # some network file systems have no locks

    def _clear(self) -> None:
        for path in self.layout.work.iterdir():
            if path.name == LOCK_NAME:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_disk(destination: Path, needed: int) -> None:
    """Raises BadInput where the file system of `destination` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(existing_parent(destination.absolute())).free
    if free < needed:
        raise BadInput(
            f"{destination}: the disk has {format_bytes(free)} free and {format_bytes(needed)} are needed; "
            "free some, choose another destination, or pass --skip-disk-check"
        )


def _make_directory(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"cannot write to {work.parent}") from None


def _refuse_strangers(layout: Layout) -> None:
    parent = layout.final.parent
    if layout.ours is None:
        if layout.final.exists() and not _is_empty(layout.final) and _identity_in(layout.record) is None:
            raise BadInput(f"{layout.final} was not written by ferry, and stays. Choose an empty or a new directory")
        return
    if not parent.is_dir():
        return
    strangers = sorted(path.name for path in parent.iterdir() if path.name not in layout.ours)
    if strangers:
        raise BadInput(f"{parent} holds something else: {strangers[0]}. Choose an empty or a new directory")


def _flat(identity: dict[str, str]) -> dict[str, str]:
    """An identity with the fields of a value that is a JSON object as entries of their own, for messages."""
    flat: dict[str, str] = {}
    for key, value in identity.items():
        fields = json.loads(value) if value.startswith("{") else None
        flat |= {f"{key} {name}": str(field) for name, field in fields.items()} if fields else {key: value}
    return flat


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _identity_in(path: Path) -> dict[str, str] | None:
    """The identity that a run noted in `path`, None where there is no such file or it is no such note."""
    try:
        value = json.loads(path.read_bytes())["identity"]
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError, TypeError):
        return None
    return {str(key): str(part) for key, part in value.items()} if isinstance(value, dict) else None


def clean(destination: Path) -> list[Path]:
    """Removes the work directories of unfinished runs at `destination`, and returns what was removed.

    Raises OutsideFailure where a run is at work there.
    """
    destination = destination.absolute()
    found = [
        work for work in (destination / ".ferry", destination.with_name(f".{destination.name}.ferry")) if work.is_dir()
    ]
    for work in found:
        with Workspace(Layout(destination, work, work, work), {}, overwrite=True) as workspace:
            workspace.abandon()
    return found
