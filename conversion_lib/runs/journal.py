"""The journal of one part: which pieces are committed. A retry reads it first.

Each group of pieces is one JSON line, `{"pieces": [[path, [[start, stop], ...]], ...]}`, appended only after the
group's data are durable. A line that a kill cut short is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from conversion_lib.plan.pieces import Piece
from conversion_lib.plan.plan import Plan
from conversion_lib.storage.logs import Log


class Journal:
    """The chunks of `plan` that are durable according to `log`.

    Args:
        log: Where the journal is kept. It is read at once.
        plan: The plan of the run.
        require: Called before a group is added. Raises if this run may no longer write.
    """

    def __init__(self, log: Log, plan: Plan, require: Callable[[], None] = lambda: None) -> None:
        self._log, self._plan, self._require = log, plan, require
        self._arrays = {array.path: array for array in plan.arrays}
        self._done: dict[str, set[tuple[int, ...]]] = {}
        log.replay(self._take)

    def has(self, piece: Piece) -> bool:
        """Whether every chunk of `piece` is committed; the committed pieces may have had other sizes."""
        array = self._plan.arrays[piece.array]
        done = self._done.get(array.path)
        return done is not None and all(chunk in done for chunk in array.chunks_in(piece.box))

    @property
    def count(self) -> int:
        """Number of committed chunks."""
        return sum(len(chunks) for chunks in self._done.values())

    def open(self) -> Journal:
        """Opens the journal for `add`, and returns it."""
        self._log.open()
        return self

    def add(self, pieces: Iterable[Piece]) -> None:
        """Adds a group of pieces, whose data must be durable.

        Raises:
            OutsideFailure: This run may no longer write.
        """
        self._require()
        entries = [[self._plan.arrays[piece.array].path, piece.box] for piece in pieces]
        self._log.append(json.dumps({"pieces": entries}).encode() + b"\n")

    def close(self) -> None:
        """Closes the log."""
        self._log.close()

    def _take(self, line: bytes) -> bool:
        """Takes a group's line; False if it is damaged or cut short."""
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
