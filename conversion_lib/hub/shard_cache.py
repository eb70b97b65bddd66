"""Keeps a few shards of a checkpoint on disk: fetches them early, and removes them when no piece needs them.

A shard in the cache is whole and verified. When all pieces that end with it are made, the shard is removed. Only the
ranges that later pieces need together with other shards are kept, at their offsets in a sparse file. A kill leaves both
kinds of file intact.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from conversion_lib.errors import FerryError, OutsideFailure
from conversion_lib.storage.files import write_atomically
from conversion_lib.storage.links import refuse_links_in

Range = tuple[int, int]
"""The first byte and the byte after the last."""

_RANGES = TypeAdapter(tuple[Range, ...])
KEPT_SUFFIX = ".kept"
COPY_BYTES = 1 << 20


@dataclass
class Demand:
    """The pieces that still need a shard.

    Attributes:
        name: The shard.
        size: Its size in bytes.
        users: The number of pieces for which it is the last shard.
        later: The number of pieces that also need a later shard.
        ranges: The bytes of it that those later pieces need.
        until: The index of the last shard that any of those later pieces needs.
    """

    name: str
    size: int
    users: int = 0
    later: int = 0
    ranges: set[Range] = field(default_factory=set)
    until: int = 0

    @property
    def over(self) -> bool:
        """Whether no piece needs the shard any more."""
        return self.users <= 0 and self.later <= 0


class ShardCache:
    """A cache of shards in a directory.

    Args:
        directory: Created if necessary, and removed at the end when nothing is left to do.
        fetch: Fetches the named shard to the directory, whole and verified. It runs on the cache's threads, and stops
            when the event is set.
        evicting: Called with a file's path before the file is removed.
    """

    def __init__(
        self,
        directory: Path,
        fetch: Callable[[str, threading.Event], None],
        evicting: Callable[[Path], None],
    ) -> None:
        self._directory, self._fetch, self._evicting = directory, fetch, evicting
        self._demands: dict[str, Demand] = {}
        self._waiting: list[str] = []
        self._coming: set[str] = set()
        self._whole: set[str] = set()
        self._kept: dict[str, tuple[Range, ...]] = {}
        self._urgent: list[str] = []
        self._unforeseen: dict[str, set[Range]] = {}
        self._failure: BaseException | None = None
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._limit = 0

    @property
    def begun(self) -> bool:
        """Whether `begin` was called."""
        return self._limit > 0

    def begin(self, demands: Sequence[Demand], limit: int) -> None:
        """Starts to fetch shards in the background.

        Useful files of an earlier run are used, the others are removed.

        Args:
            demands: One for each shard of the source, in order.
            limit: The most whole shards on disk at a time.
        """
        self._demands = {demand.name: demand for demand in demands}
        self._limit = limit
        refuse_links_in(self._directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._take_stock()
        self._waiting = [name for name, demand in self._demands.items() if self._lacks(demand)]
        for name in list(self._whole):
            self._shrink_if_done(name)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(limit)]
        for thread in self._threads:
            thread.start()

    def _take_stock(self) -> None:
        for path in self._directory.iterdir():
            demand = self._demands.get(path.name)
            if demand and path.is_file() and path.stat().st_size == demand.size:
                self._whole.add(path.name)
            elif path.suffix == ".json" and (kept := path.with_suffix("")).exists():
                with suppress(ValidationError):  # a note that is damaged says of nothing that it was kept
                    self._kept[kept.name.removesuffix(KEPT_SUFFIX)] = _RANGES.validate_json(path.read_bytes())
        wanted = {self._kept_path(name) for name in self._kept.keys() & self._demands.keys()}
        wanted |= {_note_of(path) for path in wanted} | {self._directory / name for name in self._whole}
        self._kept = {name: ranges for name, ranges in self._kept.items() if name in self._demands}
        for path in set(self._directory.iterdir()) - wanted:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _lacks(self, demand: Demand) -> bool:
        if demand.name in self._whole:
            return False
        return demand.users > 0 or not all(_covered(self._kept.get(demand.name, ()), *need) for need in demand.ranges)

    def path(self, name: str, start: int, stop: int) -> Path:
        """Waits for the bytes from `start` to before `stop` of the shard `name`.

        Returns:
            A file with these bytes at their offsets. It may be replaced after the call: then call again.

        Raises:
            OutsideFailure: A fetch failed, for whatever reason; what has been converted is correct. Or the cache is
                being closed.
        """
        with self._changed:
            while True:
                if name in self._whole:
                    return self._directory / name
                if _covered(self._kept.get(name, ()), start, stop):
                    return self._kept_path(name)
                if self._failure is not None:
                    raise _as_outside(self._failure)
                # a shard that is not fetched yet comes in its turn: pieces wait in the order of the shards
                if name not in (*self._urgent, *self._coming, *self._waiting):
                    self._unforeseen.setdefault(name, set()).add((start, stop))
                    self._urgent.append(name)
                    self._changed.notify_all()
                self._changed.wait()

    def used(self, name: str, *, last: bool) -> None:
        """Notes that a piece that needs the shard was made.

        Args:
            name: The shard.
            last: Whether it is the last shard that the piece needs, so that the piece counts in the demand's `users`
                and not in `later`.
        """
        with self._changed:
            demand = self._demands[name]
            if last:
                demand.users -= 1
            else:
                demand.later -= 1
            if demand.over and name in self._kept:
                self._remove(self._kept_path(name), _note_of(self._kept_path(name)))
                del self._kept[name]
            done = name in self._whole and demand.users <= 0
        if done:
            self._shrink_if_done(name)

    def close(self) -> None:
        """Stops the fetches. Keeps the cache for a resumed run, unless all pieces are made."""
        with self._changed:
            self._stopped.set()
            self._failure = self._failure or OutsideFailure("the run is ending")
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if all(demand.over for demand in self._demands.values()):
            shutil.rmtree(self._directory, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None or self._next() is not None)
                name = self._next()
                if self._failure is not None or name is None:
                    return
                self._coming.add(name)
                self._urgent = [other for other in self._urgent if other != name]
                self._waiting = [other for other in self._waiting if other != name]
            try:
                self._fetch(name, self._stopped)
            except BaseException as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._stopped.set()
                    self._changed.notify_all()
                return
            with self._changed:
                self._coming.discard(name)
                self._whole.add(name)
                self._changed.notify_all()
            self._shrink_if_done(name)

    def _next(self) -> str | None:
        """Returns the shard to fetch next: one that was removed too early, whatever the limit, or the next in order."""
        if self._urgent:
            return self._urgent[0]
        room = len(self._whole) + len(self._coming) < self._limit
        return self._waiting[0] if self._waiting and room else None

    def _shrink_if_done(self, name: str) -> None:
        """Replaces a shard that only later pieces need by the ranges that they need."""
        with self._changed:
            demand = self._demands[name]
            if name not in self._whole or demand.users > 0:
                return
            # also keep unexpected requests: the reader that waits for one may not have read it yet
            ranges = (demand.ranges if demand.later > 0 else set()) | self._unforeseen.get(name, set())
            if not all(_covered(self._kept.get(name, ()), *need) for need in ranges):
                self._keep(name, ranges)
            self._whole.discard(name)
            self._remove(self._directory / name)
            self._changed.notify_all()

    def _keep(self, name: str, ranges: Iterable[Range]) -> None:
        kept, partial = self._kept_path(name), self._directory / f"{name}.partial"
        with (self._directory / name).open("rb") as source, partial.open("wb") as target:
            for start, stop in ranges:
                source.seek(start)
                target.seek(start)
                while start < stop:
                    start += target.write(source.read(min(COPY_BYTES, stop - start)))
            target.flush()
            os.fsync(target.fileno())
        self._remove(_note_of(kept))  # it describes the previous file
        self._evicting(kept)
        partial.replace(kept)
        self._kept[name] = tuple(sorted(ranges))
        write_atomically(_note_of(kept), json.dumps(self._kept[name]).encode())

    def _kept_path(self, name: str) -> Path:
        return self._directory / f"{name}{KEPT_SUFFIX}"

    def _remove(self, *paths: Path) -> None:
        for path in paths:
            self._evicting(path)
            path.unlink(missing_ok=True)


def _note_of(kept: Path) -> Path:
    """Returns the path of the list of kept ranges, which is written after the kept file."""
    return kept.with_name(f"{kept.name}.json")


def _covered(ranges: Sequence[Range], start: int, stop: int) -> bool:
    return any(first <= start and stop <= last for first, last in ranges)


def _as_outside(failure: BaseException) -> BaseException:
    return OutsideFailure(str(failure)) if isinstance(failure, FerryError) else failure


def most_bytes(demands: Sequence[Demand], limit: int) -> int:
    """Returns the most bytes on disk at a time: whole shards, and kept ranges of others.

    Args:
        demands: One for each shard of the source, in order.
        limit: The most whole shards at a time.
    """
    kept = most = 0
    ending = [0] * len(demands)
    for index, demand in enumerate(demands):
        size = sum(stop - start for start, stop in demand.ranges)
        kept += size
        ending[demand.until] += size
        most = max(most, kept)
        kept -= ending[index]
    return most + limit * max((demand.size for demand in demands), default=0)
