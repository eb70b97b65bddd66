"""The journal of one part in a bucket: an object for each group, since an object cannot be appended to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from conversion_lib.plan.pieces import Piece
from conversion_lib.plan.plan import Plan
from conversion_lib.runs.journal import Committed, line_of
from conversion_lib.storage.files import in_parallel
from conversion_lib.storage.gcs import REQUESTS, BucketLocation


class BucketJournal(Committed):
    """The committed chunks of one part, in the objects below `place`.

    require_claim: raises OutsideFailure where this run may not write there any more.
    """

    def __init__(self, place: BucketLocation, plan: Plan, require_claim: Callable[[], None]) -> None:
        super().__init__(plan)
        self._place, self._require_claim = place, require_claim
        names = _read(place, self)
        self._next = 1 + max((int(name.partition(".")[0]) for name in names), default=-1)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Notes a group whose data are durable."""
        self._require_claim()
        (self._place / f"{self._next:08d}.json").write(line_of(self._plan, pieces))
        self._next += 1

    def close(self) -> None:
        """Nothing: every group is an object of its own."""


def journal_place(work: BucketLocation, part: int) -> BucketLocation:
    """Where the journal of a part lies; a run of the whole is part 0."""
    return work / f"journal-{part}"


def committed_chunks(place: BucketLocation, plan: Plan) -> int:
    """How many chunks of `plan` the journal at `place` has; 0 where there is none."""
    committed = Committed(plan)
    _read(place, committed)
    return committed.count


def _read(place: BucketLocation, into: Committed) -> list[str]:
    names = place.below()
    for line in in_parallel(lambda name, _: (place / name).read(), names, threads=REQUESTS):
        into.take(line or b"")
    return names
