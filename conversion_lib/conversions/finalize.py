"""The last step of a conversion that was split into parts: merges what they wrote, and commits.

It does not need the source: each part leaves the plan and the side files in the work directory. So it can run on a
machine without access to the source.
"""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import ValidationError

from conversion_lib.conversions.runner import RunResult
from conversion_lib.errors import BadInput
from conversion_lib.plan.parts import Part
from conversion_lib.plan.plan import Plan
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import Target, parsed
from conversion_lib.runs.journal import Journal
from conversion_lib.runs.note import PLAN_NAME, RUN_NAME, Run
from conversion_lib.runs.trees import maxtext_staging
from conversion_lib.runs.workspace import exclusively, finished, journal_of, unfinished
from conversion_lib.sinks.orbax import OrbaxSink
from conversion_lib.storage.interface import Staging


class FinalizeResult(RunResult):
    """The result of `ferry finalize`."""

    chunks: int = 0
    """Number of chunks in the checkpoint, all of them found in the store. 0 if it was complete already."""


def finalize(destination: Path | str, *, reporter: Reporter = SILENT) -> FinalizeResult:
    """Merges what the parts of a conversion wrote to a checkpoint at `destination`/0/items, and commits it.

    Does nothing if that was done before. After an interruption, it can be run again.

    Raises:
        BadInput: A part is missing or unfinished, which the message names; or no conversion was begun.
        OutsideFailure: A part is still running, or writing failed.
    """
    started = time.monotonic()
    staging = maxtext_staging(destination)
    if not staging.begun():
        return _finished(staging, reporter)
    with exclusively(staging, reporter):
        run = unfinished(staging)
        if run is None:
            result = _finished(staging, reporter)
            staging.clear()  # left by a run that was killed just after its commit
            return result
        plan = _require_every_part(staging, run)
        target = parsed(Target, run.identity.get("target", "").encode(), staging.work / RUN_NAME, "target")
        OrbaxSink(staging.build, plan, target).finish()
        staging.commit()
    seconds = time.monotonic() - started
    reporter.say(f"finalize: {sum(run.chunks)} chunks of {len(run.chunks)} parts in {seconds:.1f} s")
    return FinalizeResult(
        path=staging.shown,
        fingerprint=plan.fingerprint,
        already=False,
        chunks=sum(run.chunks),
        seconds=seconds,
    )


def _finished(staging: Staging, reporter: Reporter) -> FinalizeResult:
    """Returns the result for a complete checkpoint. Raises BadInput if there is none."""
    path, record = staging.shown, finished(staging)
    if record is None:
        raise BadInput(f"{path} holds no conversion to finalize; `ferry convert SRC {path} --part I/N` begins one")
    reporter.say(f"{path} is already done: fingerprint {record.fingerprint[:12]}")
    return FinalizeResult(path=path, fingerprint=record.fingerprint, already=True)


def _require_every_part(staging: Staging, run: Run) -> Plan:
    """Returns the plan of a run whose parts are all finished. Raises BadInput that names the first unfinished one."""
    parts = [Part(index, len(run.chunks)) for index, chunks in enumerate(run.chunks) if chunks]
    for part in parts:
        if not journal_of(staging, part.index).exists():
            raise BadInput(f"part {part} has not been started: {_remedy(staging, part)}")
    plan = _plan(staging, run)
    for part in parts:
        chunks = run.chunks[part.index]
        left = chunks - Journal(journal_of(staging, part.index), plan).count
        if left:
            raise BadInput(f"part {part} has {left} of {chunks} chunks left to write: {_remedy(staging, part)}")
    return plan


def _remedy(staging: Staging, part: Part) -> str:
    return f"run `ferry convert SRC {staging.shown} --part {part}`"


def _plan(staging: Staging, run: Run) -> Plan:
    path = staging.work / PLAN_NAME
    content = path.read()
    try:
        plan = Plan.from_json(content or b"")
    except ValidationError:
        plan = None
    if plan is None or plan.full_identity != run.identity:
        raise BadInput(
            f"{path} is not the plan of the unfinished run, or another version of ferry wrote it: run the parts again, "
            "or finalize with the version that ran them"
        )
    return plan
