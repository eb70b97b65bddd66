"""What `scheduled_onboarding` finds out: the commits at the Hub, what is published, and what is to be done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import huggingface_hub
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from conversion_lib.core.retry import Backoff
from conversion_lib.errors import BadInput, FerryError
from conversion_lib.hub import hub_endpoint, resolve
from conversion_lib.hub.errors import explain
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.destinations.base import MANIFEST_NAME, Destination
from conversion_lib.publish.location import PublishedPath, read_marker
from conversion_lib.publish.manifest import Manifest
from conversion_lib.record import PROVENANCE_NAME
from ferry_airflow.scheduling.catalog import Entry, Revision, TargetChoice
from ferry_airflow.scheduling.finding import Finding, State

ONBOARDING = "onboard_checkpoint"
PATIENCE = Backoff(attempts=3)
"""A Hub that does not answer is asked again at the next look."""

RunState = Callable[[str], str | None]
"""The state of the run of `onboard_checkpoint` with this id, as Airflow says it; None where there is none."""


def look(entry: Entry, run_state: RunState, *, reporter: Reporter = SILENT) -> list[Finding]:
    """Each target of an entry: whether its newest commit is published, under way, or to be onboarded.

    Asks the Hub at HF_ENDPOINT and the entry's destination. Raises nothing that is about this entry alone: the
    finding says it.
    """
    try:
        commit = newest_commit(entry.repo, entry.revision, reporter=reporter)
    except FerryError as error:
        return [_finding(entry, target, state=_state_of(error), note=str(error)) for target in entry.targets]
    return [_judge(entry, target, commit, run_state) for target in entry.targets]


def newest_commit(repo: str, revision: Revision, *, reporter: Reporter = SILENT) -> str:
    """The commit that `revision` stands for now. A pinned commit is not asked for.

    Raises BadInput for an unknown repository, branch or tag; OutsideFailure where the Hub cannot be reached.
    """
    if revision.commit:
        return revision.commit
    if revision.branch:
        return resolve(repo, revision.branch, backoff=PATIENCE, reporter=reporter).commit
    pattern = str(revision.tag)
    tags = {name: commit for name, commit in _tags(repo, reporter).items() if fnmatchcase(name, pattern)}
    if not tags:
        raise BadInput(f"{repo} has no tag like {pattern}")
    return tags[max(tags, key=_age)]


def run_id_of(entry: Entry, commit: str, target: TargetChoice) -> str:
    """The one run id that this commit, target and destination can have: a second trigger finds the first run."""
    digest = hashlib.sha256(json.dumps([entry.repo, entry.destination]).encode()).hexdigest()[:6]
    return f"onboard__{entry.published_as}__{commit[:12]}__{target.slug}__{digest}"


def triggers(entry: Entry, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """`trigger_run_id` and `conf` of each onboarding that the findings of this entry ask for."""
    return [
        {"trigger_run_id": finding.run_id, "conf": entry.conf(finding.commit, target)}
        for target, finding in zip(entry.targets, findings, strict=True)
        if finding.state == "new" and finding.commit
    ]


def settled(finding: Finding, run_state: RunState) -> Finding:
    """A finding that was `new`, after its onboarding has ended or not been started."""
    if finding.state != "new" or finding.run_id is None:
        return finding
    try:
        published = _published(open_destination(finding.destination, _path(finding)))
    except FerryError as error:
        return finding.model_copy(update={"state": _state_of(error), "note": str(error)})
    if published:
        return finding.model_copy(update={"state": "published", "note": "onboarded in this run", **published})
    state = run_state(finding.run_id)
    not_started = {"state": "failed", "note": f"its run was not started: see the task onboard, and {ONBOARDING}"}
    update = _of_run(state) if state else not_started
    return finding.model_copy(update=update)


def summary_lines(findings: Sequence[Finding], problems: Sequence[str]) -> list[str]:
    """A table for a log, and under it what is wrong with the catalogue."""
    rows = [("model", "target", "commit", "state", "verdict", "size", "note"), *(f.row for f in findings)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *(f"WRONG ENTRY: {problem}" for problem in problems)]


def needs_a_person(findings: Iterable[Finding], problems: Sequence[str]) -> list[str]:
    """What the next look will not put right by itself, one line each."""
    wanted = [finding for finding in findings if finding.state in ("wrong", "failed")]
    return [*problems, *(f"{f.repo}: {f.note}{f' (run {f.run_id})' if f.run_id else ''}" for f in wanted)]


def _judge(entry: Entry, target: TargetChoice, commit: str, run_state: RunState) -> Finding:
    run_id = run_id_of(entry, commit, target)
    finding = _finding(entry, target, state="new", note="to be onboarded", commit=commit, run_id=run_id)
    try:
        published = _published(open_destination(entry.destination, _path(finding)))
    except FerryError as error:
        return finding.model_copy(update={"state": _state_of(error), "note": str(error)})
    if published:
        return finding.model_copy(update={"state": "published", "note": "", **published})
    state = run_state(run_id)
    return finding.model_copy(update=_of_run(state)) if state else finding


def _of_run(state: str) -> dict[str, str]:
    """What the state of an onboarding says, where nothing is published."""
    if state in ("queued", "running"):
        return {"state": "running", "note": f"its onboarding is {state}"}
    return {"state": "failed", "note": f"its onboarding ended as {state} and published nothing: clear it to try again"}


def _finding(entry: Entry, target: TargetChoice, **found: Any) -> Finding:
    return Finding(
        repo=entry.repo,
        model=entry.published_as,
        revision=str(entry.revision),
        target=target.slug,
        destination=entry.destination,
        **found,
    )


def _path(finding: Finding) -> str:
    return str(PublishedPath(finding.model, str(finding.commit), finding.target))


def _state_of(error: FerryError) -> State:
    return "wrong" if isinstance(error, BadInput) else "skipped"


def _published(destination: Destination) -> dict[str, Any] | None:
    """What a Finding says of a location; None where nothing is published there (no marker)."""
    if (marker := read_marker(destination)) is None:
        return None
    try:
        manifest = Manifest.model_validate_json(destination.read(MANIFEST_NAME) or b"")
        verdict = json.loads(destination.read(PROVENANCE_NAME) or b"{}").get("verdict") or {}
    except (ValidationError, ValueError) as error:
        raise BadInput(f"{destination.url} has a marker and no manifest of this version: `ferry verify` it") from error
    return {
        "url": destination.url,
        "published": marker.published,
        "verdict": verdict.get("verdict") if marker.checked else "unchecked",
        "max_kl": _number(verdict.get("max_kl")),
        "bytes": sum(file.size for file in manifest.files),
    }


def _number(value: object) -> float | None:
    """A figure of a verdict; one that is not finite is written as a string there, and has no place in XCom's JSON."""
    return float(value) if isinstance(value, int | float) else None


def _tags(repo: str, reporter: Reporter) -> dict[str, str]:
    """The repository's tags, with the commit of each."""
    endpoint = hub_endpoint()

    def ask() -> dict[str, str]:
        try:
            refs = huggingface_hub.HfApi(endpoint).list_repo_refs(repo)
        except Exception as error:
            raise explain(error, f"the tags of {repo}", repo, endpoint) from error
        return {tag.name: tag.target_commit for tag in refs.tags}

    return PATIENCE.run(ask, reporter=reporter)


def _age(tag: str) -> tuple[bool, Version, list[tuple[bool, int, str]]]:
    """What tags are sorted by: versions by their order (2.0rc1 before 2.0), others before them, numbers as numbers."""
    parts = [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", tag)]
    try:
        return True, Version(tag), parts
    except InvalidVersion:
        return False, Version("0"), parts
