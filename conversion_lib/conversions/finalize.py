"""The last step of a conversion that was split into parts: merges what they wrote, and commits.

It needs nothing of the source: each part leaves the plan and the files that go along in the work directory, so that
it can run on a machine that does not see the source.
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
from conversion_lib.record import Target
from conversion_lib.runs.bucket_workspace import BucketLayout
from conversion_lib.runs.layouts import layout_at
from conversion_lib.runs.note import PLAN_NAME, Run
from conversion_lib.runs.workspace import Layout
from conversion_lib.sinks.orbax import OrbaxSink


class FinalizeResult(RunResult):
    """What `ferry finalize` reports. chunks: how many there are; each was found in the store."""

    chunks: int = 0


def finalize(destination: Path | str, *, reporter: Reporter = SILENT) -> FinalizeResult:
    """Makes a checkpoint at `destination`/0/items of what the parts of its conversion wrote there.

    Does nothing where that has been done; ended midway, it can be run again. Raises BadInput where a part is missing
    or unfinished, naming it, and where nothing was begun; OutsideFailure where a part is at work.
    """
    started = time.monotonic()
    layout = layout_at(destination, reporter)
    if not layout.begun():
        return _finished(layout, reporter)
    with layout.exclusively():
        run = layout.unfinished()
        if run is None:
            result = _finished(layout, reporter)
            layout.clear()  # left by a run that was ended just after it had committed
            return result
        plan = _require_every_part(layout, run)
        OrbaxSink(layout.step, plan, Target.model_validate_json(run.identity["target"])).finish()
        layout.commit()
    seconds = time.monotonic() - started
    reporter.say(f"finalize: {sum(run.chunks)} chunks of {len(run.chunks)} parts in {seconds:.1f} s")
    return FinalizeResult(
        path=layout.shown,
        fingerprint=plan.fingerprint,
        already=False,
        chunks=sum(run.chunks),
        seconds=seconds,
    )


def _finished(layout: Layout | BucketLayout, reporter: Reporter) -> FinalizeResult:
    """Where no run is unfinished: the checkpoint that is there. Raises BadInput where there is none."""
    path, record = layout.shown, layout.finished()
    if record is None:
        raise BadInput(f"{path} holds no conversion to finalize; `ferry convert SRC {path} --part I/N` begins one")
    reporter.say(f"{path} is already done: fingerprint {record.fingerprint[:12]}")
    return FinalizeResult(path=path, fingerprint=record.fingerprint, already=True)


def _require_every_part(layout: Layout | BucketLayout, run: Run) -> Plan:
    """The plan of a run whose parts have all done their shares. Raises BadInput that names the first that has not."""
    parts = [Part(index, len(run.chunks)) for index, chunks in enumerate(run.chunks) if chunks]
    for part in parts:
        if not layout.started(part.index):
            raise BadInput(f"part {part} has not been started: {_remedy(layout, part)}")
    plan = _plan(layout, run)
    for part in parts:
        chunks = run.chunks[part.index]
        left = chunks - layout.committed(part.index, plan)
        if left:
            raise BadInput(f"part {part} has {left} of {chunks} chunks to go: {_remedy(layout, part)}")
    return plan


def _remedy(layout: Layout | BucketLayout, part: Part) -> str:
    return f"run `ferry convert SRC {layout.shown} --part {part}`"


def _plan(layout: Layout | BucketLayout, run: Run) -> Plan:
    path = layout.notes / PLAN_NAME
    content = path.read()
    try:
        plan = Plan.from_json(content or b"")
    except ValidationError:
        plan = None
    if plan is None or plan.full_identity != run.identity:
        raise BadInput(
            f"{path} is not the plan of the unfinished run, or another version of ferry wrote it; run its parts again, "
            "or finalize with the version that ran them"
        )
    return plan
