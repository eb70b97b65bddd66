"""The looks of `scheduled_onboarding`: the commits on the Hub, what is published, and what to do."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import huggingface_hub
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel

from conversion_lib.core.retry import Backoff
from conversion_lib.errors import BadInput, FerryError
from conversion_lib.hub import hub_endpoint, resolve
from conversion_lib.hub.errors import explain
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.destinations.base import MANIFEST_NAME, Destination
from conversion_lib.publish.location import PublishedPath, read_marker
from conversion_lib.publish.manifest import Manifest
from conversion_lib.record import PROVENANCE_NAME, parsed
from ferry_airflow.scheduling.catalog import Entry, Revision, TargetChoice
from ferry_airflow.scheduling.finding import Finding, State

ONBOARDING = "onboard_checkpoint"
PATIENCE = Backoff(attempts=3)
"""A Hub that does not answer is asked again at the next look."""

RunState = Callable[[str], str | None]
"""From the id of a run of `onboard_checkpoint` to its state in Airflow; None if the run does not exist."""


def look(entry: Entry, run_state: RunState, *, reporter: Reporter = SILENT) -> list[Finding]:
    """Returns for each target of an entry whether its newest commit is published, being onboarded, or new.

    Asks the Hub at HF_ENDPOINT and the entry's destination. An error of either (FerryError) is not raised: the finding
    reports it.

    Args:
        entry: The entry to look at.
        run_state: Returns the state of a run.
        reporter: Gets a message before each retry.

    Returns:
        One finding for each of the entry's targets, in their order.
    """
    try:
        commit = newest_commit(entry.repo, entry.revision, reporter=reporter)
    except FerryError as error:
        return [_finding(entry, target, state=_state_of(error), note=str(error)) for target in entry.targets]
    return [_judge(entry, target, commit, run_state) for target in entry.targets]


def newest_commit(repo: str, revision: Revision, *, reporter: Reporter = SILENT) -> str:
    """Returns the commit that a revision currently means. For a pinned commit, the Hub is not asked.

    Raises:
        BadInput: The repository, the branch or a matching tag does not exist, or the token does not open it.
        OutsideFailure: The Hub does not answer.
    """
    if revision.commit:
        return revision.commit
    if revision.branch:
        return resolve(repo, revision.branch, backoff=PATIENCE, reporter=reporter).commit
    pattern = str(revision.tag)
    tags = {name: commit for name, commit in _tags(repo, reporter).items() if fnmatchcase(name, pattern)}
    if not tags:
        raise BadInput(f"{repo} has no tag that matches {pattern}")
    return tags[max(tags, key=_age)]


def run_id_of(entry: Entry, commit: str, target: TargetChoice) -> str:
    """Returns the run id for a commit, target and destination. It is always the same, so a run is not started twice."""
    digest = hashlib.sha256(json.dumps([entry.repo, entry.destination]).encode()).hexdigest()[:6]
    return f"onboard__{entry.published_as}__{commit[:12]}__{target.slug}__{digest}"


def triggers(entry: Entry, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Returns what to trigger for the new targets of an entry.

    Args:
        entry: The entry.
        findings: What `look` returned for it.

    Returns:
        `trigger_run_id` and `conf` for each new target.
    """
    return [
        {"trigger_run_id": finding.run_id, "conf": entry.conf(finding.commit, target)}
        for target, finding in zip(entry.targets, findings, strict=True)
        if finding.state == "new" and finding.commit
    ]


def settled(finding: Finding, run_state: RunState) -> Finding:
    """Returns a finding that was `new` as it is after its onboarding has ended or was not started. Others stay."""
    if finding.state != "new" or finding.run_id is None:
        return finding
    try:
        published = _published(open_destination(finding.destination, _path(finding)))
    except FerryError as error:
        return finding.model_copy(update={"state": _state_of(error), "note": str(error)})
    if published:
        return finding.model_copy(update={"state": "published", "note": "onboarded in this run", **published})
    state = run_state(finding.run_id)
    note = f"its onboarding was not started: see the task onboard and the DAG {ONBOARDING}"
    update = _of_run(state) if state else {"state": "failed", "note": note}
    return finding.model_copy(update=update)


def summary_lines(findings: Sequence[Finding], problems: Sequence[str]) -> list[str]:
    """Returns the lines of a table for a log, followed by the catalogue's problems."""
    rows = [("model", "target", "commit", "state", "verdict", "size", "note"), *(f.row for f in findings)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *(f"WRONG ENTRY: {problem}" for problem in problems)]


def needs_a_person(findings: Iterable[Finding], problems: Sequence[str]) -> list[str]:
    """Returns one line for each problem that needs a person: the next look will not solve it."""
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
    """The state and note of a finding whose onboarding exists and has published nothing."""
    if state in ("queued", "running"):
        return {"state": "running", "note": f"its onboarding is {state}"}
    return {"state": "failed", "note": f"its onboarding ended as {state} and published nothing: clear its run to retry"}


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
    """What a Finding says of a location; None if nothing is published there (no marker)."""
    if (marker := read_marker(destination)) is None:
        return None
    read, where = destination.read, destination.url
    try:
        manifest = parsed(Manifest, read(MANIFEST_NAME) or b"", f"{where}/{MANIFEST_NAME}", "manifest")
        provenance = parsed(_Provenance, read(PROVENANCE_NAME) or b"{}", f"{where}/{PROVENANCE_NAME}", "provenance")
    except BadInput as error:
        raise BadInput(f"{error}; `ferry verify {where}` says what else is wrong there") from None
    verdict = provenance.verdict or _Verdict()
    return {
        "url": destination.url,
        "published": marker.published,
        "verdict": verdict.verdict if marker.checked else "unchecked",
        # one that is not finite has no place in XCom's JSON
        "max_kl": verdict.max_kl if verdict.max_kl is not None and math.isfinite(verdict.max_kl) else None,
        "bytes": sum(file.size for file in manifest.files),
    }


class _Verdict(BaseModel):
    verdict: str | None = None
    max_kl: float | None = None


class _Provenance(BaseModel):
    """What is shown of a published checkpoint's provenance."""

    verdict: _Verdict | None = None


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
    """The sort key of a tag. Versions come last, in their order (2.0rc1 before 2.0); numbers count as numbers."""
    parts = [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", tag)]
    try:
        return True, Version(tag), parts
    except InvalidVersion:
        return False, Version("0"), parts
