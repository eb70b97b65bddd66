"""The journal of one part: which pieces are committed. Appended a group at a time, and read first by a retry.

One JSON line a group, `{"pieces": [[path, [[start, stop], ...]], ...]}`, written only after the group's data are
durable. A line cut short by a kill is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from conversion_lib.plan.pieces import Piece
from conversion_lib.plan.plan import Plan
from conversion_lib.storage.logs import Log


class Journal:
    """The chunks of `plan` that `log` says are durable.

    require: called before a group is noted; raises where this run may not write any more.
    """

    def __init__(self, log: Log, plan: Plan, require: Callable[[], None] = lambda: None) -> None:
        self._log, self._plan, self._require = log, plan, require
        self._arrays = {array.path: array for array in plan.arrays}
        self._done: dict[str, set[tuple[int, ...]]] = {}
        log.replay(self._take)

    def has(self, piece: Piece) -> bool:
        """Whether every chunk of `piece` is committed, in pieces of whatever size."""
        array = self._plan.arrays[piece.array]
        done = self._done.get(array.path)
        return done is not None and all(chunk in done for chunk in array.chunks_in(piece.box))

    @property
    def count(self) -> int:
        """How many chunks are committed."""
        return sum(len(chunks) for chunks in self._done.values())

    def open(self) -> Journal:
        """Makes ready to add to it."""
        self._log.open()
        return self

    def add(self, pieces: Iterable[Piece]) -> None:
        """Notes a group whose data are durable."""
        self._require()
        entries = [[self._plan.arrays[piece.array].path, piece.box] for piece in pieces]
        self._log.append(json.dumps({"pieces": entries}).encode() + b"\n")

    def close(self) -> None:
        self._log.close()

    def _take(self, line: bytes) -> bool:
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
