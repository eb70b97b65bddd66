"""One run at one destination: what it finds there, what it resumes, and how it ends.

    DST/.ferry/run.json, plan.json     what the run writes; run.json is written first and removed last
    DST/.ferry/journal-<part>          the pieces that a part has committed
    DST/.ferry/lease-<part>.json       held by the run of a part; lease.json by a run that needs the destination alone

The parts of one run share the directory. Each has its own journal and lease.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.plan.parts import WHOLE, Part
from conversion_lib.plan.plan import Plan
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import CheckpointRecord, record_in
from conversion_lib.runs.differences import identity_in, refuse_difference
from conversion_lib.runs.journal import Journal
from conversion_lib.runs.locks import ALONE, Busy, Locks, lease_of
from conversion_lib.runs.note import RUN_NAME, Run, joined
from conversion_lib.storage.interface import Staging
from conversion_lib.storage.logs import Log

BEGINNING_SECONDS = 5.0
"""How long a part waits for another that holds the destination alone, perhaps only to begin their common run."""
RETRY_SECONDS = 0.1


class Workspace:
    """One run at a destination. It is a context manager that holds leases against other runs at the same destination.

    Entering resumes an unfinished run, or begins one. It raises BadInput if the checkpoint or the unfinished run there
    has another source, target, version or number of parts and may not be overwritten, and if the disk is too small;
    OutsideFailure if another run is at work.

    Args:
        staging: The destination.
        run: The run to begin. `self.run` is the run that is resumed, if there is one.
        part: The part that this process writes. None: the whole. Parts of one run work at the same time.
        overwrite: Starts over, whatever is there. A part joins an unfinished run of its own kind all the same, since a
            retry of one part must not discard what the others wrote.
        needed_bytes: Disk space of the whole run, including what an unfinished run has written. 0: not checked.
        reporter: Shows messages.
    """

    def __init__(
        self,
        staging: Staging,
        run: Run,
        *,
        part: Part | None = None,
        overwrite: bool = False,
        needed_bytes: int = 0,
        reporter: Reporter = SILENT,
    ) -> None:
        self.staging, self.run = staging, run
        self._part, self._overwrite, self._needed = part, overwrite, needed_bytes
        self._locks = Locks(staging.work, reporter)
        self.already = False
        """Whether the same run was finished here before, so that there is nothing to do."""

    def open_journal(self, plan: Plan) -> Journal:
        """Opens the journal of this part. It can be added to while the lease is held."""
        return Journal(self.journal, plan, self._locks.require).open()

    @property
    def journal(self) -> Log:
        """The log of this part's journal."""
        return journal_of(self.staging, (self._part or WHOLE).index)

    def commit(self) -> None:
        """Makes the result visible to readers.

        Raises:
            OutsideFailure: Another run has taken over in the meantime.
        """
        self._locks.require()
        self.staging.commit()

    def abandon(self) -> None:
        """Removes what this run wrote from bad input; for a part, only its journal, so that nothing counts as written.

        What other parts wrote stays.
        """
        if self._part is None:
            self.staging.clear()
        else:
            self.journal.remove()

    def __enter__(self) -> Workspace:
        _refuse_strangers(self.staging)
        if not self.staging.begun():
            self.already = self._finished()
        if self.already:
            return self
        self.staging.prepare(self._needed)
        try:
            self._enter()
        except BaseException:
            self._locks.release()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._locks.release()

    def _enter(self) -> None:
        """Prepares. A part retries while another part begins their common run."""
        deadline = time.monotonic() + BEGINNING_SECONDS
        while True:
            try:
                return self._prepare()
            except Busy as busy:
                if time.monotonic() >= deadline or not self._may_pass(busy):
                    raise
            time.sleep(RETRY_SECONDS)

    def _may_pass(self, busy: Busy) -> bool:
        """Whether the conflict may be temporary: another part begins, or has just begun, this part's run."""
        if self._part is None or busy.lease == lease_of(self._part):
            return False
        return busy.lease == ALONE or self._join()

    def _prepare(self) -> None:
        # a difference is reported first: waiting for another run to end would not help then
        if not self._finished() and self._join() and self._part is not None:
            self._locks.take_part(self._part)
            return
        self._locks.take_alone()
        self.staging.restore()
        # another run may have finished while this one waited for the lease
        self.already = self._finished()
        if self.already:
            self.staging.clear()
            return
        if not self._join():
            self._begin()
        if self._part is not None:
            self._locks.take_part(self._part)

    def _join(self) -> bool:
        """Takes over an unfinished run as this one, and returns whether there was one."""
        held = _noted(self.staging)
        held = joined(held, self.run, str(self.staging.work), part=self._part, overwrite=self._overwrite)
        if held is None or not self.staging.building():
            return False  # no run, or one that was committed and ended before its note was removed
        self.run = held
        return True

    def _begin(self) -> None:
        """Removes what is there, and writes this run's note."""
        if not self._overwrite and _is_foreign(self.staging):
            raise self._foreign()
        self.staging.begin()
        note = self.staging.work / RUN_NAME
        if not note.write_first(self.run.model_dump_json().encode()):
            raise OutsideFailure(f"another run began in {self.staging.shown} at the same moment; run this one again")

    def _finished(self) -> bool:
        if self._overwrite or not self.staging.whole():
            return False
        held = identity_in(self.staging.read(self.staging.tree.record))
        if held is None:
            raise self._foreign()
        refuse_difference(held, self.run.identity, f"{self.staging.final} exists already, from another run")
        return True

    def _foreign(self) -> BadInput:
        return BadInput(f"{self.staging.final} exists already and was not written by ferry; --overwrite replaces it")


def journal_of(staging: Staging, part: int) -> Log:
    """Returns the log of a part's journal. A run of the whole is part 0."""
    return (staging.work / f"journal-{part}").log()


def unfinished(staging: Staging) -> Run | None:
    """Returns the run that was begun here and is not committed, or None."""
    return _noted(staging) if staging.building() else None


def _noted(staging: Staging) -> Run | None:
    """Returns the run that was begun in the work directory, or None."""
    try:
        return Run.model_validate_json((staging.work / RUN_NAME).read() or b"")
    except ValidationError:
        return None


def finished(staging: Staging) -> CheckpointRecord | None:
    """Returns the record of the complete checkpoint here, or None.

    Raises:
        BadInput: The record is damaged or of another version.
    """
    return record_in(staging.read, staging.shown) if staging.whole() else None


@contextmanager
def exclusively(staging: Staging, reporter: Reporter = SILENT) -> Iterator[None]:
    """Keeps all runs away from the destination until the block ends. An interrupted commit is undone first.

    Raises:
        OutsideFailure: A run is at work there.
    """
    with Locks(staging.work, reporter).alone():
        staging.restore()
        yield


def clean(stagings: Iterable[Staging], reporter: Reporter = SILENT) -> list[str]:
    """Removes what unfinished runs left, and returns the removed work directories.

    Raises:
        OutsideFailure: A run is at work there.
    """
    removed = []
    for staging in stagings:
        if staging.begun():
            with exclusively(staging, reporter):
                staging.clear()
            removed.append(str(staging.work))
    return removed


def _is_foreign(staging: Staging) -> bool:
    """Whether the destination holds something that Ferry did not write."""
    if not staging.exists() or identity_in(staging.read(staging.tree.record)) is not None:
        return False
    return staging.whole() or unfinished(staging) is None


def _refuse_strangers(staging: Staging) -> None:
    """Raises BadInput if the destination holds something that Ferry did not write: not even --overwrite removes it."""
    if staging.tree.alone:
        if strangers := staging.strangers():
            raise BadInput(
                f"{staging.shown} holds something else: {strangers[0]}. Choose an empty or a new destination"
            )
    elif _is_foreign(staging):
        raise BadInput(f"{staging.final} was not written by ferry and is kept. Choose an empty or a new destination")
