"""Where a run builds what it writes, and what it finds at its destination.

Everything is built in a hidden sibling of what it will become, on the same file system, and renamed at the end. So
a reader sees nothing or the whole, and a killed run leaves its journal and its data where the next one looks.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.files import disk_error, existing_parent, sync_directory, write_atomically
from conversion_lib.progress import format_bytes

RUN_NAME = "run.json"
JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = "lock"
REPLACED_NAME = "replaced"


@dataclass(frozen=True)
class Layout:
    """The paths of one destination.

    final: what appears when the run commits.
    work: the hidden directory of the run; `build` in it becomes `final`.
    record: where the finished run's identity is read from.
    beside: names next to `final` that are built in `work` under the same name and placed before `final`; the record
        is the last of them, so that `final` with its record means a finished run.
    dropped: names next to `final` that go when it is replaced.
    alone: whether `final` has its parent to itself: then a stranger's file there is refused.
    """

    final: Path
    work: Path
    build: Path
    record: Path
    beside: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    alone: bool = False

    def next_to(self, name: str) -> Path:
        return self.final.parent / name


class Workspace:
    """One run's place. Use as a context manager: it holds a lock against a second run at the same destination.

    needed_bytes: what the run will take on disk, less what an unfinished one has there; 0: not checked.
    chunk_limit: noted for the next try, which must cut chunks alike.

    Entering prepares the work directory: it goes on with an unfinished run, or begins one. Raises BadInput where the
    destination or an unfinished run is of another source, target or version, unless it may be overwritten, and where
    the disk is too small; OutsideFailure where another run is at work.
    """

    def __init__(
        self,
        layout: Layout,
        identity: dict[str, str],
        *,
        overwrite: bool = False,
        needed_bytes: int = 0,
        chunk_limit: int = 0,
    ) -> None:
        self.layout, self._identity, self._overwrite = layout, identity, overwrite
        self._needed, self._chunk_limit = needed_bytes, chunk_limit
        self._lock: int | None = None
        self.already = False
        """Whether the very same run has been finished here: then there is nothing to do."""

    @property
    def journal(self) -> Path:
        return self.layout.work / JOURNAL_NAME

    def __enter__(self) -> Workspace:
        work = self.layout.work
        _refuse_strangers(self.layout)
        if not work.exists():
            self.already = self._finished()
        if self.already:
            return self
        if self._needed:
            check_disk(self.layout.final, self._needed - _bytes_in(work))
        _make_directory(work)
        self._take_lock()
        try:
            _restore(self.layout)
            # another run may have finished while this one waited for nothing
            self.already = self._finished()
            if self.already:
                shutil.rmtree(work)
            else:
                self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        unfinished = _identity_in(self.layout.work / RUN_NAME)
        if unfinished is not None and not self._overwrite:
            self._refuse_difference(unfinished, f"{self.layout.work} holds an unfinished run")
        else:
            self._clear()
        note = {"identity": self._identity, "chunk_limit": self._chunk_limit}
        write_atomically(self.layout.work / RUN_NAME, json.dumps(note).encode())

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _finished(self) -> bool:
        final = self.layout.final
        if self._overwrite or not final.exists() or _is_empty(final):
            return False
        held = _identity_in(self.layout.record)
        if held is None:
            raise BadInput(f"{final} is there already and was not written by ferry; --overwrite replaces it")
        self._refuse_difference(held, f"{final} is there already, from another run")
        return True

    def commit(self) -> None:
        """Renames what was built to where it belongs, and removes the work directory.

        What it replaces is moved into the work directory first, and comes back where the run ends before the new is
        in place.
        """
        layout = self.layout
        if layout.final.exists():
            replaced = layout.work / REPLACED_NAME
            replaced.mkdir(exist_ok=True)
            # the record first: without it nothing at the destination counts as finished
            for name in (*reversed(layout.beside), *layout.dropped, layout.final.name):
                if layout.next_to(name).exists():
                    layout.next_to(name).rename(replaced / name)
        for name in layout.beside:
            _remove(layout.next_to(name))
            (layout.work / name).rename(layout.next_to(name))
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
            busy = True
        except OSError:
            return  # some network file systems have no locks
        else:
            # a run that was just finishing has removed the file: then the lock is on nothing
            busy = not path.exists() or not os.path.samestat(os.fstat(self._lock), path.stat())
        if busy:
            self.__exit__()
            raise OutsideFailure(f"another run is at work in {self.layout.work}; wait for it to end")

    def _clear(self) -> None:
        for path in self.layout.work.iterdir():
            if path.name != LOCK_NAME:
                _remove(path)


def noted_chunk_limit(layout: Layout) -> int | None:
    """The chunk limit of the unfinished run at `layout`, None where there is none."""
    try:
        return int(json.loads((layout.work / RUN_NAME).read_bytes())["chunk_limit"]) or None
    except (OSError, KeyError, ValueError, TypeError):
        return None


def _restore(layout: Layout) -> None:
    """Undoes a commit that was ended before the new was in place: what it replaced comes back."""
    replaced = layout.work / REPLACED_NAME
    if not replaced.is_dir():
        return
    if layout.build.exists() or not layout.final.exists():
        for name in (*layout.dropped, layout.final.name, *layout.beside):
            placed = name in layout.beside and not (layout.work / name).exists()
            if placed or (replaced / name).exists():
                _remove(layout.next_to(name))
            if (replaced / name).exists():
                (replaced / name).rename(layout.next_to(name))
    shutil.rmtree(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _bytes_in(directory: Path) -> int:
    """Bytes that the files below take on disk."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


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
    """Nothing of somebody else's is touched, whatever --overwrite says."""
    parent = layout.final.parent
    if not layout.alone:
        if layout.final.exists() and not _is_empty(layout.final) and _identity_in(layout.record) is None:
            raise BadInput(f"{layout.final} was not written by ferry, and stays. Choose an empty or a new directory")
        return
    if not parent.is_dir():
        return
    ours = {layout.final.name, layout.work.name, *layout.beside, *layout.dropped}
    strangers = sorted(path.name for path in parent.iterdir() if path.name not in ours)
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


def clean(layouts: Iterable[Layout]) -> list[Path]:
    """Removes the work directories of unfinished runs, and returns what was removed.

    Raises OutsideFailure where a run is at work there.
    """
    removed = []
    for layout in layouts:
        if not layout.work.is_dir():
            continue
        workspace = Workspace(layout, {})
        workspace._take_lock()
        try:
            _restore(layout)
            workspace.abandon()
        finally:
            workspace.__exit__()
        removed.append(layout.work)
    return removed
