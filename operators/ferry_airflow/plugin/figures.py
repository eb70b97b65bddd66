"""What the pages show, ready for display. Made from records only, without Airflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from conversion_lib.core.plain_json import NOT_FINITE
from conversion_lib.progress import format_bytes
from ferry_airflow.plugin.reports import published_url
from ferry_airflow.plugin.runs import Run, Stage
from ferry_airflow.scheduling.finding import Finding

NOTHING = "–"
CHECK = "check"
LARGEST = 1e30
"""Of a figure. Larger ones, infinity and NaN are not shown."""


@dataclass(frozen=True)
class StageRow:
    """One row of the table of stages.

    Attributes:
        left: Where its bar begins, in percent of the run's time.
        width: The length of its bar, in percent of the run's time.
    """

    name: str
    state: str
    tries: int
    seconds: str
    bytes_in: str
    bytes_out: str
    rate: str
    peak: str
    note: str
    left: float
    width: float


@dataclass(frozen=True)
class RunView:
    """A run's tab.

    Attributes:
        verdict: `pass` or `fail`; empty if there is none yet.
        facts: Names and values.
        figures: Names and values of the check.
        checks: Whether the DAG checks logits, so that there is or will be a report.
        unfinished: Whether the run is queued or running.
    """

    title: str
    state: str
    verdict: str
    facts: list[tuple[str, str]]
    figures: list[tuple[str, str]]
    stages: list[StageRow]
    checks: bool
    unfinished: bool


@dataclass
class ModelRow:
    """One target of one model at one destination.

    Attributes:
        revision: As in the catalogue, such as `branch main`; empty if only a person onboarded it.
        seen: The last commit seen on the Hub, or else the published one.
        published: The published commit; empty if there is none.
        max_kl: Of the published checkpoint's check, in nats.
        bytes: Size of all published files.
        when: Time of publication.
        run: DAG id and run id of the last known onboarding.
    """

    repo: str
    model: str
    target: str
    destination: str
    revision: str = ""
    seen: str = ""
    published: str = ""
    verdict: str = ""
    max_kl: float | None = None
    bytes: int | None = None
    when: datetime | None = None
    state: str = ""
    note: str = ""
    run: tuple[str, str] | None = None
    url: str = ""

    @property
    def size(self) -> str:
        """`bytes` for display."""
        return _bytes(self.bytes)

    @property
    def kl(self) -> str:
        """`max_kl` for display; empty if there is none."""
        return "" if self.max_kl is None else f"{self.max_kl:.1e}"

    @property
    def age(self) -> str:
        """How long ago it was published, such as `2 days ago`."""
        return NOTHING if self.when is None else _age(datetime.now(UTC) - self.when)


def view_run(run: Run) -> RunView | None:
    """Returns what a run's tab shows; None if the run's DAG has no stage of Ferry."""
    if not any(stage.manifest for stage in run.stages) and "repo" not in run.conf:
        return None
    check = run.manifest(CHECK) or {}
    source = next((s.manifest for s in run.stages if s.manifest and s.manifest.get("repo")), run.conf)
    target = next((s.manifest["target"] for s in run.stages if s.manifest and s.manifest.get("target")), "")
    facts = [
        ("Commit", str(source.get("commit") or run.conf.get("revision") or "")),
        ("Target", str(target)),
        ("Plan", _plan((run.manifest("resolve") or {}).get("plan"))),
        *_places(run, check),
    ]
    return RunView(
        title=str(source.get("repo") or run.conf.get("checkpoint") or run.run_id),
        state=run.state,
        verdict=str(check.get("verdict") or ""),
        facts=[(name, value) for name, value in facts if value],
        figures=_check_figures(check),
        stages=_stage_rows(run.stages),
        checks=any(CHECK in (stage.task_id, (stage.manifest or {}).get("stage")) for stage in run.stages),
        unfinished=run.state in ("queued", "running"),
    )


def _plan(plan: object) -> str:
    """The plan that `resolve` made for the run."""
    if not isinstance(plan, dict) or not plan:
        return ""
    size = {key: _bytes(plan.get(key)) for key in ("bytes_in", "bytes_out", "disk_bytes", "peak_bytes")}
    time = _seconds(_finite(plan.get("seconds")) or 0)
    moved = f"{size['bytes_in']} in, {size['bytes_out']} out"
    return f"{moved}; {size['disk_bytes']} of disk, at most {size['peak_bytes']} of memory; about {time}"


def _places(run: Run, check: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the files are: the published ones, or, if nothing is published, those where the stages run."""
    if url := published_url(run):
        return [("Published at", url)]
    left = [stage.manifest for stage in run.stages if stage.manifest]
    last: Mapping[str, Any] = next((one for one in reversed(left) if one.get("url") or one.get("path")), {})
    return [("Files", str(last.get("url") or last.get("path") or "")), ("Report", str(check.get("report") or ""))]


def _check_figures(check: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = (
        ("max_kl", "largest KL of a token", "{:.2e}"),
        ("mean_kl", "mean KL", "{:.2e}"),
        ("max_abs_diff", "largest difference of a logit", "{:.2e}"),
        ("top1", "same most likely token", "{:.2%}"),
        ("top10", "ten most likely in common", "{:.2%}"),
    )
    return [(name, told) for key, name, shown in names if (told := _told(check.get(key), shown))]


def _told(value: Any, shown: str) -> str:
    """Returns a figure as text; empty if it is none. A number that is not finite is text in the manifest."""
    if isinstance(value, str) and value in NOT_FINITE:
        return value
    return "" if _finite(value) is None else shown.format(value)


def _stage_rows(stages: Iterable[Stage]) -> list[StageRow]:
    stages = list(stages)
    now = datetime.now(UTC)
    starts = [stage.started for stage in stages if stage.started]
    ends = [stage.ended or now for stage in stages if stage.started]
    first = min(starts, default=now)
    whole = max((max(ends, default=now) - first).total_seconds(), 1e-3)
    return [_stage_row(stage, first, whole, now) for stage in stages]


def _stage_row(stage: Stage, first: datetime, whole: float, now: datetime) -> StageRow:
    left = width = 0.0
    lasted = None
    if stage.started:
        lasted = ((stage.ended or now) - stage.started).total_seconds()
        left, width = 100 * (stage.started - first).total_seconds() / whole, 100 * lasted / whole
    manifest = stage.manifest or {}
    seconds = _finite(manifest.get("seconds", lasted))
    moved = max(_finite(manifest.get(key)) or 0 for key in ("bytes_in", "bytes_out"))
    return StageRow(
        name=stage.task_id if stage.map_index < 0 else f"{stage.task_id} {stage.map_index}",
        state=stage.state or "waiting",
        tries=stage.tries,
        seconds=NOTHING if seconds is None else _seconds(seconds),
        bytes_in=_bytes(manifest.get("bytes_in")),
        bytes_out=_bytes(manifest.get("bytes_out")),
        rate=f"{format_bytes(moved / seconds)}/s" if moved and seconds and seconds > 0 else NOTHING,
        peak=_bytes(manifest.get("peak_bytes")),
        note=_note(manifest),
        left=round(left, 2),
        width=round(max(width, 0.4), 2) if stage.started else 0.0,
    )


def _note(manifest: Mapping[str, Any]) -> str:
    if manifest.get("error"):
        return str(manifest["error"]).removeprefix("ferry: ")
    if manifest.get("already"):
        return "was already complete"
    if manifest.get("skipped"):
        return "not needed"
    if manifest.get("pieces_skipped"):
        return f"resumed: {manifest['pieces_skipped']} of {manifest.get('pieces')} pieces were already written"
    return ""


@dataclass
class _Table:
    """Rows by model, target, destination and revision. Events are added in order, the oldest first."""

    rows: list[ModelRow] = field(default_factory=list)

    def alike(self, model: str, target: str, destination: str) -> list[ModelRow]:
        """The rows that differ only in the revision."""
        wanted = (model, target, destination.rstrip("/"))
        return [row for row in self.rows if (row.model, row.target, row.destination) == wanted]

    def add_row(self, repo: str, model: str, target: str, destination: str) -> ModelRow:
        self.rows.append(ModelRow(repo, model, target, destination.rstrip("/")))
        return self.rows[-1]

    def add_finding(self, finding: Finding, onboarding: str) -> None:
        named = (finding.model, finding.target, finding.destination)
        # a row that only a person onboarded so far becomes the catalogue's
        same = [row for row in self.alike(*named) if row.revision in (finding.revision, "")]
        row = max(same, key=lambda row: row.revision) if same else self.add_row(finding.repo, *named)
        row.revision = finding.revision
        row.seen = finding.commit or row.seen
        row.state, row.note = finding.state, "" if finding.state == "published" else finding.note
        if finding.run_id and finding.state in ("running", "failed", "new"):
            row.run = (onboarding, finding.run_id)
        if finding.state == "published":
            row.published, row.url = finding.commit or "", finding.url or ""
            row.verdict, row.max_kl, row.bytes = finding.verdict or "", finding.max_kl, finding.bytes
            row.when = datetime.fromisoformat(finding.published) if finding.published else None

    def add_onboarding(self, dag_id: str, run_id: str, when: datetime, stages: Mapping[str, Mapping[str, Any]]) -> None:
        published, check = stages["publish"], stages.get("check", {})
        parts = str(published["url"]).rsplit("/", 3)
        if len(parts) < 4:  # not where publish puts anything
            return
        destination, model, commit, target = parts
        same = self.alike(model, target, destination)
        row = next((row for row in same if row.seen == commit), same[0] if same else None)
        row = row or self.add_row(str(published.get("repo") or model), model, target, destination)
        row.seen = row.seen or commit
        row.published, row.url, row.when, row.run = commit, str(published["url"]), when, (dag_id, run_id)
        row.verdict, row.max_kl = str(check.get("verdict") or ""), _finite(check.get("max_kl"))
        row.bytes = _count(published.get("bytes"))
        row.state, row.note = "published", ""


def view_models(
    findings: Iterable[tuple[datetime, Finding]],
    onboardings: Mapping[str, tuple[datetime, Mapping[str, Mapping[str, Any]]]],
    onboarding_dag: str,
) -> list[ModelRow]:
    """Returns one row for each target of each model, from looks and onboardings. The newest event wins.

    Args:
        findings: The findings of looks, with the time of each.
        onboardings: By run id: when the last stage ended, and the manifests by stage.
        onboarding_dag: The id of the DAG of these runs.
    """
    table = _Table()
    events: list[tuple[datetime, Finding | str]] = list(findings)
    events += [(when, run) for run, (when, stages) in onboardings.items() if stages.get("publish", {}).get("url")]
    for when, event in sorted(events, key=lambda one: one[0]):
        if isinstance(event, Finding):
            table.add_finding(event, onboarding_dag)
        else:
            table.add_onboarding(onboarding_dag, event, when, onboardings[event][1])
    return sorted(table.rows, key=lambda row: (row.repo.lower(), row.target, row.destination, row.revision))


def _finite(value: object) -> float | None:
    """A manifest's figure; None for anything but a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if number else None  # type: ignore[arg-type]  # mypy does not follow `number`


def _count(value: object) -> int | None:
    found = _finite(value)
    return None if found is None or found < 0 else int(found)


def _bytes(count: object) -> str:
    found = _count(count)
    return format_bytes(found) if found else NOTHING


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _age(delta: Any) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(delta.total_seconds(), 0)
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"
