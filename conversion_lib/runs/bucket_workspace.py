"""A run whose destination is a prefix in a bucket: written in place, since nothing can be renamed there.

    DST/.ferry/run.json, plan.json      what the run writes; run.json comes first and goes last
    DST/.ferry/journal-<part>/<n>.json  one object for each group of pieces
    DST/.ferry/claim-<part>.json        held by the run of a part, claim.json by one that needs the place alone
    DST/hf/*, DST/ferry.json, DST/0/... what is to be

A checkpoint is whole when `0/commit_success.txt` is there, which is written last and removed first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.plan.parts import WHOLE, Part
from conversion_lib.plan.plan import Plan
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import COMMIT_NAME, HF_DIR_NAME, RECORD_NAME, REPORT_DIR_NAME, CheckpointRecord
from conversion_lib.runs.bucket_journal import BucketJournal, committed_chunks, journal_place
from conversion_lib.runs.differences import identity_in, refuse_difference
from conversion_lib.runs.locks import CLAIM_NAME
from conversion_lib.runs.note import RUN_NAME, Run, joined
from conversion_lib.storage.gcs import BucketLocation
from conversion_lib.storage.locations import Location

if TYPE_CHECKING:
    from conversion_lib.runs.bucket_locks import RunClaim

WORK_NAME = ".ferry"
STEP_NAME = "0"
MARKERS = (f"{STEP_NAME}/{COMMIT_NAME}", f"{STEP_NAME}/items/{COMMIT_NAME}")
BESIDE_CLAIM = ".ferry_on_the_fly.json"
"""Who converts on the fly, beside the checkpoint: what lies in OURS is cleared away by a run that begins anew."""
OURS = (STEP_NAME, WORK_NAME, HF_DIR_NAME, REPORT_DIR_NAME, RECORD_NAME)


@dataclass(frozen=True)
class BucketLayout:
    """The objects of one destination, `root`. alone: whether a stranger's object below it is refused.

    reporter: told when another run's claim is waited for.
    """

    root: BucketLocation
    alone: bool = True
    reporter: Reporter = SILENT

    @property
    def shown(self) -> str:
        """What a person calls the destination."""
        return str(self.root)

    @property
    def step(self) -> Location:
        """Where the arrays are written."""
        return self.root / STEP_NAME

    @property
    def notes(self) -> BucketLocation:
        """Where a run keeps what later ones read."""
        return self.root / WORK_NAME

    @contextmanager
    def drafts(self) -> Iterator[Path]:
        """A directory in which to write what is to lie beside the arrays; of several parts, the first's stays."""
        with tempfile.TemporaryDirectory(prefix="ferry-beside-") as name:
            yield Path(name)
            for path in sorted(Path(name).rglob("*")):
                if path.is_file():
                    (self.root / path.relative_to(name).as_posix()).write_first(path.read_bytes())

    def open(self, run: Run, *, part: Part | None, overwrite: bool, needed_bytes: int) -> BucketWorkspace:
        """A BucketWorkspace here; a bucket has room for all."""
        return BucketWorkspace(self, run, part=part, overwrite=overwrite)

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keeps every run away from the destination. Raises OutsideFailure where one is at work there."""
        with ExitStack() as held:
            self.take_alone(held)
            yield

    def take_alone(self, held: ExitStack) -> RunClaim:
        """Holds the destination alone until `held` is closed. Raises OutsideFailure where any run is at work."""
        from conversion_lib.runs.bucket_locks import take_alone

        return take_alone(self.notes, held, self.reporter)

    def take_part(self, part: Part, held: ExitStack) -> RunClaim:
        """Holds a part until `held` is closed. Raises OutsideFailure where it, or one that is alone, is at work."""
        # imported here, since the client takes half a second that runs in a directory need not spend
        from conversion_lib.runs.bucket_locks import take_part

        return take_part(self.notes, part, held, self.reporter)

    def begun(self) -> bool:
        """Whether a run has left anything here that is in progress."""
        return WORK_NAME in self.root.children()

    def unfinished(self) -> Run | None:
        """The run that was begun here and is not committed; None where there is none."""
        if self.finished() is not None:
            return None
        try:
            return Run.model_validate_json((self.notes / RUN_NAME).read() or b"")
        except ValidationError:
            return None

    def started(self, part: int) -> bool:
        """Whether a part has a journal."""
        return bool(journal_place(self.notes, part).below())

    def committed(self, part: int, plan: Plan) -> int:
        """How many chunks the journal of a part has."""
        return committed_chunks(journal_place(self.notes, part), plan)

    def finished(self) -> CheckpointRecord | None:
        """The record of the checkpoint that is whole here; None where there is none."""
        note = (self.root / RECORD_NAME).read() if (self.root / MARKERS[0]).read() is not None else None
        try:
            return CheckpointRecord.model_validate_json(note) if note is not None else None
        except ValidationError as error:
            text = error.errors()[0]["msg"]
            raise BadInput(f"{self.root / RECORD_NAME} is not a checkpoint record of this version: {text}") from error

    def commit(self) -> None:
        """Removes what the run kept for later ones; readers have seen the checkpoint since its marker was written."""
        self.clear()

    def clear(self) -> bool:
        """Removes what an unfinished run left, and says whether there was anything. A whole checkpoint stays."""
        whole = self.finished() is not None
        below = [f"{WORK_NAME}/{path}" for path in self.notes.below()] if whole else self.root.below()
        ours = [
            path
            for path in below
            if path.partition("/")[0] in OURS and not path.startswith(f"{WORK_NAME}/{CLAIM_NAME}")
        ]
        # the notes of whose it is go last: a removal that is ended midway can be gone on with
        last = (RECORD_NAME, f"{WORK_NAME}/{RUN_NAME}")
        self.root.remove(path for path in ours if path not in last)
        for path in last:
            self.root.remove({path} & set(ours))
        return bool(ours)


class BucketWorkspace:
    """One run's place in a bucket: what `Workspace` is on a file system, with claims for locks.

    Raises BadInput where the destination or an unfinished run is of another source, target, version or number of
    parts, unless it may be overwritten; OutsideFailure where another run is at work.
    """

    def __init__(self, layout: BucketLayout, run: Run, *, part: Part | None = None, overwrite: bool = False) -> None:
        self.layout, self.run = layout, run
        self._part, self._overwrite = part, overwrite
        self._held = ExitStack()
        self._claim: RunClaim | None = None
        self.already = False
        """Whether the very same run has been finished here: then there is nothing to do."""

    def __enter__(self) -> BucketWorkspace:
        _refuse_strangers(self.layout)
        try:
            self._prepare()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.close()

    def open_journal(self, plan: Plan) -> BucketJournal:
        """The journal of this part, to add to for as long as the claim is held."""
        place = journal_place(self.layout.notes, (self._part or WHOLE).index)
        return BucketJournal(place, plan, self._require_claim)

    def commit(self) -> None:
        """See `BucketLayout.commit`."""
        self.layout.commit()

    def abandon(self) -> None:
        """Removes what this run wrote, or for a part its journal, so that it counts as not done."""
        if self._part is None:
            self.layout.clear()
        else:
            journal = journal_place(self.layout.notes, self._part.index)
            journal.remove(journal.below())

    def _require_claim(self) -> None:
        if self._claim is not None and self._claim.lost.is_set():
            raise OutsideFailure(f"another run took {self.layout.shown} over while this one stood still: run again")

    def _prepare(self) -> None:
        # what differs is said first: waiting for another run to end would not help then
        self.already = self._finished()
        if self.already and not self.layout.begun():
            return
        if self._part is None:
            self._claim = self.layout.take_alone(self._held)
            self._settle()
            return
        if self.already or not self._join():
            try:
                with ExitStack() as held:
                    self.layout.take_alone(held)
                    self._settle()
            except OutsideFailure:
                if self.already or not self._join():
                    raise  # else another part has begun it meanwhile
        if not self.already:
            self._claim = self.layout.take_part(self._part, self._held)

    def _settle(self) -> None:
        """With the place alone: what was left is cleared away, gone on with, or another run begun."""
        self.already = self._finished()
        if self.already:
            self.layout.clear()
        elif not self._join():
            self._begin()

    def _join(self) -> bool:
        """Takes an unfinished run as this one, and says whether there was one to take."""
        held = self.layout.unfinished()
        held = joined(held, self.run, self.layout.shown, part=self._part, overwrite=self._overwrite)
        if held is not None:
            self.run = held
        return held is not None

    def _begin(self) -> None:
        """Removes what is there, the marker first, and notes this run."""
        root = self.layout.root
        foreign = STEP_NAME in root.children() and (root / RECORD_NAME).read() is None
        if foreign and not self._overwrite and (root / WORK_NAME / RUN_NAME).read() is None:
            raise BadInput(f"{self.layout.step} is there already and was not written by ferry; --overwrite replaces it")
        for marker in MARKERS:
            root.remove([marker])
        self.layout.clear()
        note = root / WORK_NAME / RUN_NAME
        if not note.write_first(self.run.model_dump_json().encode()):
            raise OutsideFailure(f"another run has begun in {self.layout.shown} at the same moment; run this one again")

    def _finished(self) -> bool:
        root = self.layout.root
        if self._overwrite or (root / MARKERS[0]).read() is None:
            return False
        held = identity_in((root / RECORD_NAME).read())
        if held is None:
            raise BadInput(f"{self.layout.step} is there already and was not written by ferry; --overwrite replaces it")
        refuse_difference(held, self.run.identity, f"{self.layout.step} is there already, from another run")
        return True


def _refuse_strangers(layout: BucketLayout) -> None:
    """Nothing of somebody else's is touched, whatever --overwrite says."""
    if not layout.alone:
        return
    strangers = sorted(layout.root.children() - {*OURS, BESIDE_CLAIM})
    if strangers:
        raise BadInput(f"{layout.shown} holds something else: {strangers[0]}. Choose an empty or a new prefix")
