"""Where a run builds what it writes, and what it finds at its destination.

Everything is built in a hidden sibling of what it will become, on the same file system, and renamed at the end. So
a reader sees nothing or the whole, and a killed run leaves its journal and its data where the next one looks. The
parts of one run share the directory; each has a journal and a lock of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.plan.parts import WHOLE, Part
from conversion_lib.plan.plan import Plan
from conversion_lib.record import CheckpointRecord, read_record
from conversion_lib.runs.differences import identity_in, refuse_difference
from conversion_lib.runs.journal import Journal, committed_chunks
from conversion_lib.runs.locks import LOCK_NAME, Locks
from conversion_lib.runs.note import RUN_NAME, Run, joined
from conversion_lib.storage.disk import bytes_below, check_disk
from conversion_lib.storage.files import disk_error, existing_parent, remove_temporaries, sync_directory, write_first
from conversion_lib.storage.locations import LocalLocation, Location

if TYPE_CHECKING:
    from conversion_lib.runs.bucket_workspace import BucketLayout

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

    @property
    def shown(self) -> str:
        """What a person calls the destination."""
        return str(self.record.parent)

    @property
    def step(self) -> Location:
        """Where the arrays are written."""
        return LocalLocation(self.build)

    @property
    def notes(self) -> Location:
        """Where a run keeps what later ones read."""
        return LocalLocation(self.work)

    @contextmanager
    def drafts(self) -> Iterator[Path]:
        """The directory in which to write what is to lie beside `final`."""
        yield self.work

    def open(self, run: Run, *, part: Part | None, overwrite: bool, needed_bytes: int) -> Workspace:
        """A Workspace here."""
        return Workspace(self, run, part=part, overwrite=overwrite, needed_bytes=needed_bytes)

    def exclusively(self) -> AbstractContextManager[None]:
        """See `alone`."""
        return alone(self)

    def unfinished(self) -> Run | None:
        """The run that was begun here and is not committed; None where there is none."""
        return read_run(self) if self.build.exists() else None

    def begun(self) -> bool:
        """Whether a run has left anything here that is in progress."""
        return self.work.is_dir()

    def started(self, part: int) -> bool:
        """Whether a part has a journal."""
        return journal_path(self, part).exists()

    def committed(self, part: int, plan: Plan) -> int:
        """How many chunks the journal of a part has."""
        return committed_chunks(journal_path(self, part), plan)

    def finished(self) -> CheckpointRecord | None:
        """The record of the checkpoint that is whole here; None where there is none."""
        return read_record(self.record.parent) if self.final.exists() else None

    def commit(self) -> None:
        """See `commit`."""
        commit(self)

    def clear(self) -> bool:
        """Removes what an unfinished run left, and says whether there was anything."""
        if not self.work.is_dir():
            return False
        shutil.rmtree(self.work, ignore_errors=True)
        return True


def read_run(layout: Layout) -> Run | None:
    """The unfinished run at `layout`, None where there is none."""
    try:
        return Run.model_validate_json((layout.work / RUN_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


class Workspace:
    """One run's place. Use as a context manager: it holds locks against other runs at the same destination.

    run: noted where this is the first; else the one that is noted is gone on with, as `self.run`.
    part: the part that this run is; None: a run of the whole. Parts of one run enter together.
    overwrite: begins anew, whatever is there; a part joins an unfinished run of its own kind all the same, since a
        retry of one part must not throw away what the others did.
    needed_bytes: what the run will take on disk, less what an unfinished one has there; 0: not checked.

    Entering prepares the work directory: it goes on with an unfinished run, or begins one. Raises BadInput where the
    destination or an unfinished run is of another source, target, version or number of parts, unless it may be
    overwritten, and where the disk is too small; OutsideFailure where another run is at work.
    """

    def __init__(
        self,
        layout: Layout,
        run: Run,
        *,
        part: Part | None = None,
        overwrite: bool = False,
        needed_bytes: int = 0,
    ) -> None:
        self.layout, self.run = layout, run
        self._part, self._overwrite, self._needed = part, overwrite, needed_bytes
        self._locks = Locks(layout.work)
        self.already = False
        """Whether the very same run has been finished here: then there is nothing to do."""

    @property
    def journal(self) -> Path:
        return journal_path(self.layout, (self._part or WHOLE).index)

    def open_journal(self, plan: Plan) -> Journal:
        """The journal of this part, to add to."""
        return Journal(self.journal, plan)

    def commit(self) -> None:
        """See `commit`."""
        commit(self.layout)

    def __enter__(self) -> Workspace:
        work = self.layout.work
        _refuse_strangers(self.layout)
        _require_one_file_system(self.layout)
        if not work.exists():
            self.already = self._finished()
        if self.already:
            return self
        if self._needed:
            check_disk(self.layout.final, self._needed - bytes_below(work), ", or pass --skip-disk-check")
        _make_directory(work)
        try:
            with self._locks.entering():
                self._prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._locks.release()

    def _prepare(self) -> None:
        # what differs is said first: waiting for another run to end would not help then
        if not self._finished() and self._join() and self._part is not None:
            self._locks.take_part(self._part)
            return
        self._locks.take_alone()
        _restore(self.layout)
        # another run may have finished while this one waited for nothing
        self.already = self._finished()
        if self.already:
            shutil.rmtree(self.layout.work)
            return
        found = self._leftovers()
        if not self._join():
            self._begin(found)
        if self._part is not None:
            self._locks.take_part(self._part)

    def _join(self) -> bool:
        """Takes an unfinished run as this one, and says whether there was one to take."""
        held = joined(
            read_run(self.layout), self.run, str(self.layout.work), part=self._part, overwrite=self._overwrite
        )
        if held is None or not self.layout.build.exists():
            return False  # or it was committed, and ended before its note was removed
        self.run = held
        return True

    def _leftovers(self) -> list[Path]:
        """What there is to clear away, less what other parts may just be beginning with: see `_begin`."""
        return [
            path
            for path in self.layout.work.iterdir()
            if not path.name.startswith((LOCK_NAME, f".{RUN_NAME}"))
            and not (path == self.layout.build and _is_empty(path))
        ]

    def _begin(self, leftovers: list[Path]) -> None:
        """Begins anew. Where there are no locks, several parts may come here at once: the first one's note holds."""
        for path in leftovers:
            _remove(path)
        self.layout.build.mkdir(exist_ok=True)
        note = self.run.model_dump_json().encode()
        if not write_first(self.layout.work / RUN_NAME, note) and not self._join():
            raise OutsideFailure(f"another run has begun in {self.layout.work} at the same moment; run this one again")

    def _finished(self) -> bool:
        final = self.layout.final
        if self._overwrite or not final.exists() or _is_empty(final):
            return False
        held = identity_in(LocalLocation(self.layout.record).read())
        if held is None:
            raise BadInput(f"{final} is there already and was not written by ferry; --overwrite replaces it")
        refuse_difference(held, self.run.identity, f"{final} is there already, from another run")
        return True

    def abandon(self) -> None:
        """Removes what this run wrote, or for a part its journal, so that it counts as not done.

        It came from input that turned out bad. What other parts wrote is theirs.
        """
        if self._part is None:
            shutil.rmtree(self.layout.work, ignore_errors=True)
        else:
            self.journal.unlink(missing_ok=True)


def journal_path(layout: Layout, part: int) -> Path:
    """The journal of a part; a run of the whole is part 0."""
    return layout.work / f"journal-{part}.jsonl"


@contextmanager
def alone(layout: Layout) -> Iterator[None]:
    """Keeps every run away from the destination, which is as if no commit had been ended midway.

    Raises OutsideFailure where a run is at work there.
    """
    locks = Locks(layout.work)
    try:
        with locks.entering():
            locks.take_alone()
        _restore(layout)
        yield
    finally:
        locks.release()


def commit(layout: Layout) -> None:
    """Renames what was built to where it belongs, and removes the work directory.

    What it replaces is moved into the work directory first, and comes back where the run ends before the new is in
    place. To be called by whoever holds the place alone; ended midway, it can be called again.
    """
    remove_temporaries(layout.work)
    if layout.final.exists():
        replaced = layout.work / REPLACED_NAME
        replaced.mkdir(exist_ok=True)
        # the record first: without it nothing at the destination counts as finished
        for name in (*reversed(layout.beside), *layout.dropped, layout.final.name):
            if layout.next_to(name).exists():
                layout.next_to(name).rename(replaced / name)
    for name in layout.beside:
        if (layout.work / name).exists():  # else an earlier try has placed it
            _remove(layout.next_to(name))
            (layout.work / name).rename(layout.next_to(name))
    layout.build.rename(layout.final)
    sync_directory(layout.final.parent)
    shutil.rmtree(layout.work, ignore_errors=True)


def _restore(layout: Layout) -> None:
    """Undoes a commit that was ended before the new was in place: what it replaced comes back."""
    replaced = layout.work / REPLACED_NAME
    if not replaced.is_dir():
        return
    if layout.build.exists() or not layout.final.exists():
        for name in (*layout.dropped, layout.final.name, *layout.beside):
            placed = name in layout.beside and not (layout.work / name).exists()
            if placed and layout.next_to(name).exists():
                layout.next_to(name).rename(layout.work / name)  # for the next try to place
            elif (replaced / name).exists():
                _remove(layout.next_to(name))
            if (replaced / name).exists():
                (replaced / name).rename(layout.next_to(name))
    shutil.rmtree(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_directory(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"cannot write to {work.parent}") from None


def _refuse_strangers(layout: Layout) -> None:
    """Nothing of somebody else's is touched, whatever --overwrite says."""
    parent = layout.final.parent
    if not layout.alone:
        if (
            layout.final.exists()
            and not _is_empty(layout.final)
            and identity_in(LocalLocation(layout.record).read()) is None
        ):
            raise BadInput(f"{layout.final} was not written by ferry, and stays. Choose an empty or a new directory")
        return
    if not parent.is_dir():
        return
    ours = {layout.final.name, layout.work.name, *layout.beside, *layout.dropped}
    strangers = sorted(path.name for path in parent.iterdir() if path.name not in ours)
    if strangers:
        raise BadInput(f"{parent} holds something else: {strangers[0]}. Choose an empty or a new directory")


def _require_one_file_system(layout: Layout) -> None:
    """What is built is renamed to its place at the end: a mount or a link to another disk would fail only then."""
    for path in (layout.work, layout.final):
        if path.exists() and path.stat().st_dev != existing_parent(path.parent).stat().st_dev:
            raise BadInput(
                f"{path} lies on another file system than {path.parent}: what is built cannot be moved into place "
                "there. Give a directory that is on one file system as a whole"
            )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def clean(layouts: Iterable[Layout | BucketLayout]) -> list[str]:
    """Removes what unfinished runs left, and returns where. Raises OutsideFailure where a run is at work there."""
    removed = []
    for layout in layouts:
        if layout.begun():
            with layout.exclusively():
                layout.clear()
            removed.append(str(layout.notes))
    return removed
