"""The journal of one part: which pieces are committed. A retry reads it first.

Each group of pieces is one JSON line, `{"pieces": [[path, [[start, stop], ...]], ...]}`, appended only after the
group's data are durable. A line that a kill cut short is ignored, and so is one with a piece that the plan does not
have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from conversion_lib.core.boxes import Box, whole
from conversion_lib.core.documents import parse_json
from conversion_lib.errors import BadInput
from conversion_lib.plan.pieces import Piece
from conversion_lib.plan.plan import ArrayPlan, Plan
from conversion_lib.storage.logs import Log

NOTED_AGAIN = 4
"""How often a journal may note all chunks. A line beyond that counts as damaged."""


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
        # each chunk is noted once, or again by a run that took over from another
        self._room = NOTED_AGAIN * sum(array.count_chunks(whole(array.shape)) for array in plan.arrays)
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
        if not line.endswith(b"\n"):
            return False
        try:
            pieces = parse_json(line, "journal")["pieces"]
            entries = [(self._arrays[name], _box(box, self._arrays[name])) for name, box in pieces]
        except (BadInput, KeyError, TypeError, ValueError):
            return False
        self._room -= sum(array.count_chunks(box) for array, box in entries)
        if self._room < 0:
            return False
        for array, box in entries:
            self._done.setdefault(array.path, set()).update(array.chunks_in(box))
        return True


def _box(value: Any, array: ArrayPlan) -> Box:
    """Returns a noted box. Raises ValueError unless it lies within the array, or in the chunks at its edge."""
    spans = zip(value, array.shape, array.chunk_shape, strict=True)
    for (start, stop), extent, step in spans:
        if type(start) is not int or type(stop) is not int or not 0 <= start <= stop < extent + step:
            raise ValueError("no box of the array")
    return tuple((start, stop) for start, stop in value)
