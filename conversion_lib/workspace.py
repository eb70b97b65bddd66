"""Where a run builds what it writes, and what it finds at its destination.

Everything is built in a hidden sibling of what it will become, on the same file system, and renamed at the end. So
a reader sees nothing or the whole, and a killed run leaves its journal and its data where the next one looks. The
parts of one run share the directory; each has a journal and a lock of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.files import disk_error, existing_parent, remove_temporaries, sync_directory, write_first
from conversion_lib.locks import LOCK_NAME, Locks
from conversion_lib.parts import WHOLE, Part
from conversion_lib.progress import format_bytes

RUN_NAME = "run.json"
REPLACED_NAME = "replaced"
NAMED_DIFFERENCES = 4


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


class Run(BaseModel):
    """`run.json`: what an unfinished run writes and how it is shared out. All of its parts keep to it."""

    model_config = ConfigDict(frozen=True)

    identity: dict[str, str]
    chunk_limit: int
    """Bytes of a chunk at most. It depends on the memory of whoever began; the others must cut chunks alike."""
    chunks: tuple[int, ...]
    """How many chunks each part has to write: as many numbers as there are parts."""

    def __str__(self) -> str:
        return "of the whole" if len(self.chunks) == 1 else f"in {len(self.chunks)} parts"


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
        held = read_run(self.layout)
        if held is None or (self._overwrite and self._part is None):
            return False
        same = held.identity == self.run.identity and len(held.chunks) == len(self.run.chunks)
        if not same and self._overwrite:
            return False
        where = f"{self.layout.work} holds an unfinished run"
        self._refuse_difference(held.identity, where)
        if not same:
            raise BadInput(
                f"{where} {held}, and this one is {self.run}: give the same --part I/N, or --overwrite to start anew"
            )
        if not self.layout.build.exists():
            return False  # it was committed, and ended before its note was removed
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
        held = _identity_in(self.layout.record)
        if held is None:
            raise BadInput(f"{final} is there already and was not written by ferry; --overwrite replaces it")
        self._refuse_difference(held, f"{final} is there already, from another run")
        return True

    def abandon(self) -> None:
        """Removes what this run wrote, or for a part its journal, so that it counts as not done.

        It came from input that turned out bad. What other parts wrote is theirs.
        """
        if self._part is None:
            shutil.rmtree(self.layout.work, ignore_errors=True)
        else:
            self.journal.unlink(missing_ok=True)

    def _refuse_difference(self, held: dict[str, str], what: str) -> None:
        there, here = _flat(held), _flat(self.run.identity)
        parts = [
            f"{key}: {there.get(key)} there, {here.get(key)} here"
            for key in {**there, **here}  # the source before the config before the target
            if there.get(key) != here.get(key)
        ]
        if parts:
            named = "; ".join(parts[:NAMED_DIFFERENCES])
            more = len(parts) - NAMED_DIFFERENCES
            rest = f"; and {more} more" if more > 0 else ""
            raise BadInput(f"{what}; it differs in {named}{rest}. --overwrite starts anew")


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


def _bytes_in(directory: Path) -> int:
    """Bytes that the files below take on disk."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # other parts are at work there
                total += Path(parent, name).lstat().st_blocks * 512
    return total


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
        with alone(layout):
            shutil.rmtree(layout.work, ignore_errors=True)
        removed.append(layout.work)
    return removed
