"""The tasks of `scheduled_onboarding`: `looking.py` with what it needs from Airflow. Imported when a task runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from conversion_lib.progress import Reporter
from conversion_lib.shown import one_line
from ferry_airflow.base import hub_token
from ferry_airflow.layout import run_name, save_manifest
from ferry_airflow.scheduling.catalog import Entry, load_catalog
from ferry_airflow.scheduling.finding import ROWS, Finding
from ferry_airflow.scheduling.looking import ONBOARDING, look, needs_a_person, settled, summary_lines, triggers

if TYPE_CHECKING:
    from ferry_airflow.execution.base import TaskLog

READ, LOOK, CHOOSE, SUMMARIZE = "read_catalog", "look", "choose", "summarize"
"""Task ids."""
RUN_STATES = ("queued", "running", "success", "failed")
PROBLEMS = "problems"
"""The XCom key of the catalogue's problems."""


class LogReporter(Reporter):
    """Reports to the task's log, such as that the Hub does not answer and when it is asked again."""

    def __init__(self, log: TaskLog) -> None:
        super().__init__("quiet")
        self._log = log

    def say(self, message: str) -> None:
        self._log.info("%s", one_line(message))


def read_catalog(path: Path, log: TaskLog) -> list[dict[str, Any]]:
    """Returns the catalogue's valid entries as JSON. Its problems go to the log and, by XCom, to the summary.

    Raises:
        BadInput: The file cannot be read, is not YAML, or is wrong outside its models.
    """
    catalog = load_catalog(path)
    for problem in catalog.problems:
        log.error("%s", one_line(problem))
    _push(PROBLEMS, list(catalog.problems))
    return [entry.model_dump(mode="json") for entry in catalog.entries]


def look_at(entry_json: dict[str, Any], hf_conn_id: str | None, log: TaskLog) -> list[dict[str, Any]]:
    """Looks at one entry and returns the onboardings to trigger.

    Args:
        entry_json: An entry, as `read_catalog` returns it.
        hf_conn_id: Airflow connection whose password is the Hub token. None: HF_TOKEN of the environment.
        log: The task's log.

    Returns:
        `trigger_run_id` and `conf` for each new target.

    Raises:
        AirflowSkipException: The Hub or the destination does not answer.
        BadInput: The connection does not exist.
    """
    entry = Entry.model_validate(entry_json)
    if hf_conn_id:
        # the Hub's client reads it from here; the process ends with the task
        os.environ["HF_TOKEN"] = hub_token(hf_conn_id)
    findings = look(entry, _run_state, reporter=LogReporter(log))
    _push(ROWS, [finding.model_dump() for finding in findings])
    for finding in findings:
        log.info("%s", one_line("  ".join(cell for cell in finding.row if cell)))
    if all(finding.state == "skipped" for finding in findings):
        raise AirflowSkipException(findings[0].note)
    return triggers(entry, findings)


def choose(found: Iterable[list[dict[str, Any]]], log: TaskLog) -> list[dict[str, Any]]:
    """Returns all onboardings to trigger, each run id once."""
    chosen = {one["trigger_run_id"]: one for of_entry in found for one in of_entry}
    log.info("%d onboardings to trigger", len(chosen))
    return list(chosen.values())


def summarize(entries: list[dict[str, Any]], log: TaskLog) -> str:
    """Writes the summary: a table in the log, rows in XCom, and a file in the working directory.

    Returns:
        The path of the file.

    Raises:
        AirflowFailException: Something needs a person, such as a wrong entry or a failed onboarding. The summary is
            written.
    """
    context = get_current_context()
    ti, run_id = context["ti"], context["run_id"]
    looked = [Finding.model_validate(row) for rows in _pull(ti, LOOK, ROWS, range(len(entries))) for row in rows]
    findings = [settled(finding, _run_state) for finding in looked]
    problems = [problem for found in _pull(ti, READ, PROBLEMS, [-1]) for problem in found]
    missing = {entry["repo"] for entry in entries} - {finding.repo for finding in findings}
    problems += [f"{repo}: the look failed: see the log of the task {LOOK}" for repo in sorted(missing)]
    for line in summary_lines(findings, problems):
        log.info("%s", one_line(line))
    rows = [finding.model_dump() for finding in findings]
    _push(ROWS, rows)
    path = save_manifest(run_name(ti.dag_id, run_id), "summary", {"models": rows, "problems": problems})
    if lines := needs_a_person(findings, problems):
        raise AirflowFailException(f"{len(lines)} in need of attention: {'; '.join(lines)}")
    return str(path)


def _push(key: str, value: Any) -> None:
    get_current_context()["ti"].xcom_push(key=key, value=value)


def _pull(ti: Any, task_id: str, key: str, map_indexes: Iterable[int]) -> list[Any]:
    """What the mapped instances of a task pushed. Instances that pushed nothing are left out."""
    pulled = ti.xcom_pull(task_ids=[task_id], key=key, map_indexes=list(map_indexes))
    return [value for value in pulled or [] if value is not None]


def _run_state(run_id: str) -> str | None:
    count = get_current_context()["ti"].get_dr_count
    return next((state for state in RUN_STATES if count(ONBOARDING, run_ids=[run_id], states=[state])), None)
