"""The journal: which pieces are committed. Appended a group at a time, and read first by a retry.

One JSON line a group, `{"pieces": [[path, [[start, stop], ...]], ...]}`, written only after the group's data are
durable. A line cut short by a kill is left out.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path

from conversion_lib.pieces import Piece
from conversion_lib.plan import ArrayPlan, Plan


class Journal:
    """The committed chunks of one run, in the file `path`."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self._path, self._plan = path, plan
        self._done: dict[str, set[tuple[int, ...]]] = {}
        self._arrays = {array.path: array for array in plan.arrays}
        if path.exists():
            self._read()
        self._file = path.open("ab")

    def _read(self) -> None:
        data = self._path.read_bytes()
        kept = data.rfind(b"\n") + 1
        for line in data[:kept].splitlines():
            for path, box in json.loads(line)["pieces"]:
                array = self._arrays[path]
                self._done.setdefault(path, set()).update(_chunks(array, box))
        if kept < len(data):
            os.truncate(self._path, kept)

    def has(self, piece: Piece) -> bool:
        """Whether every chunk of `piece` is committed, in pieces of whatever size."""
        array = self._plan.arrays[piece.array]
        done = self._done.get(array.path)
        return done is not None and all(chunk in done for chunk in _chunks(array, piece.box))

    def add(self, pieces: Iterable[Piece]) -> None:
        """Notes a group whose data are durable."""
        entries = [[self._plan.arrays[piece.array].path, piece.box] for piece in pieces]
        self._file.write(json.dumps({"pieces": entries}).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _chunks(array: ArrayPlan, box: Iterable[tuple[int, int]]) -> Iterable[tuple[int, ...]]:
    """The indices of the chunks in a chunk-aligned box."""
    spans = zip(box, array.chunk_shape, strict=True)
    return itertools.product(*(range(start // step, -(-stop // step)) for (start, stop), step in spans))
