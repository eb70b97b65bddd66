"""The journal of one part: which pieces are committed. Appended a group at a time, and read first by a retry.

One JSON line a group, `{"pieces": [[path, [[start, stop], ...]], ...]}`, written only after the group's data are
durable. A line cut short by a kill is left out. Some room is kept aside for it, so that on a disk that runs full what
was written before can still be noted.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path

from conversion_lib.plan.pieces import Piece
from conversion_lib.plan.plan import Plan

RESERVE_BYTES = 64 << 10


class Committed:
    """The chunks of `plan` that are known to be durable."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._arrays = {array.path: array for array in plan.arrays}
        self._done: dict[str, set[tuple[int, ...]]] = {}

    def has(self, piece: Piece) -> bool:
        """Whether every chunk of `piece` is committed, in pieces of whatever size."""
        array = self._plan.arrays[piece.array]
        done = self._done.get(array.path)
        return done is not None and all(chunk in done for chunk in array.chunks_in(piece.box))

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return sum(len(chunks) for chunks in self._done.values())

    def take(self, line: bytes) -> bool:
        """Takes a group's line as noted; False for one that is damaged or cut short."""
        try:
            entries = [(self._arrays[name], box) for name, box in json.loads(line)["pieces"]]
            chunks = [(array.path, [*array.chunks_in(box)]) for array, box in entries]
        except (ValueError, KeyError, TypeError):
            return False
        if not line.endswith(b"\n"):
            return False
        for name, found in chunks:
            self._done.setdefault(name, set()).update(found)
        return True


def line_of(plan: Plan, pieces: Iterable[Piece]) -> bytes:
    """What notes a group."""
    return json.dumps({"pieces": [[plan.arrays[piece.array].path, piece.box] for piece in pieces]}).encode() + b"\n"


class Journal(Committed):
    """The committed chunks of one part, in the file `path`."""

    def __init__(self, path: Path, plan: Plan) -> None:
        super().__init__(plan)
        self._path = path
        end = _read(path, self)
        if path.exists() and end < path.stat().st_size:
            os.truncate(path, end)
        self._reserve = path.with_suffix(".reserve")
        if not self._reserve.exists():
            self._reserve.write_bytes(os.urandom(RESERVE_BYTES))  # not zeros: some file systems would not store them
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Notes a group whose data are durable."""
        line = line_of(self._plan, pieces)
        try:
            self._append(line)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._reserve.exists():
                raise
            self._reserve.unlink()
            self._append(line)

    def _append(self, line: bytes) -> None:
        """Writes the whole line and syncs it, or nothing."""
        end = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, end)
            raise

    def close(self) -> None:
        os.close(self._fd)


def committed_chunks(path: Path, plan: Plan) -> int:
    """How many chunks of `plan` the journal in the file `path` has; 0 where there is none."""
    committed = Committed(plan)
    _read(path, committed)
    return committed.count


def _read(path: Path, into: Committed) -> int:
    """Takes what the file says, and returns how many bytes of it do: what follows them is damaged, and done again."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not into.take(line):
            break
        end += len(line)
    return end
