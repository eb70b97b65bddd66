"""Ferry's runs in Airflow's database. The API server sees nothing else of them: it has no access to a worker's disk.

These tables are not a public interface of Airflow (3.3.2), so only this module uses them.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from ferry_airflow.plugin.runs import Run, Stage
from ferry_airflow.scheduling.finding import ROWS, Finding

RESULT, FAILURE = "return_value", "failure"
"""XCom keys of a stage's manifest: if it succeeded, and if it failed."""
LOOKS, ONBOARDINGS = 1000, 3000
"""The page of all models is made from at most this many XComs, the newest ones."""


def read_run(dag_id: str, run_id: str) -> Run | None:
    """Reads a run; None if it does not exist."""
    with create_session(scoped=False) as session:
        run = session.scalar(select(DagRun).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id))
        if run is None:
            return None
        left = _manifests(session, dag_id, run_id)
        found = session.scalars(
            select(TaskInstance).where(TaskInstance.dag_id == dag_id, TaskInstance.run_id == run_id)
        )
        ordered = sorted(found, key=_order)
        stages = [
            Stage(
                task_id=ti.task_id,
                map_index=ti.map_index,
                state=ti.state,
                tries=ti.try_number,
                started=ti.start_date if ti.try_number else None,  # Airflow dates skipped tasks, too
                ended=ti.end_date,
                manifest=left.get((ti.task_id, ti.map_index)),
            )
            for ti in ordered
        ]
        return Run(dag_id, run_id, str(run.state), dict(run.conf or {}), stages)


def read_findings(dag_id: str) -> list[tuple[datetime, Finding]]:
    """Reads the findings of `scheduled_onboarding` with their times, the oldest first."""
    with create_session(scoped=False) as session:
        rows = _newest(session, dag_id, ROWS, LOOKS)
        return [(row.timestamp, found) for row in rows for found in _findings(XComModel.deserialize_value(row))]


def read_onboardings(dag_id: str) -> dict[str, tuple[datetime, dict[str, dict[str, Any]]]]:
    """Reads the runs of `onboard_checkpoint`.

    Returns:
        By run id, the oldest first: when the last stage ended, and the manifests by stage.
    """
    runs: dict[str, tuple[datetime, dict[str, dict[str, Any]]]] = {}
    with create_session(scoped=False) as session:
        for row in _newest(session, dag_id, RESULT, ONBOARDINGS):
            value = XComModel.deserialize_value(row)
            if isinstance(value, dict) and "stage" in value:
                stages = runs[row.run_id][1] if row.run_id in runs else {}
                runs[row.run_id] = (row.timestamp, {**stages, str(value["stage"]): value})
    return runs


def _order(ti: TaskInstance) -> tuple[bool, float, int, int]:
    """By start time. Tasks that have not started come last, upstream ones first: they have more weight."""
    started = ti.start_date.timestamp() if ti.start_date and ti.try_number else None
    return started is None, started or 0.0, -(ti.priority_weight or 0), ti.map_index


def _newest(session: Session, dag_id: str, key: str, count: int) -> list[XComModel]:
    """The newest XComs of a key, the oldest of them first."""
    query = select(XComModel).where(XComModel.dag_id == dag_id, XComModel.key == key)
    return list(reversed(session.scalars(query.order_by(XComModel.timestamp.desc()).limit(count)).all()))


def _manifests(session: Session, dag_id: str, run_id: str) -> dict[tuple[str, int], dict[str, Any]]:
    query = select(XComModel).where(
        XComModel.dag_id == dag_id, XComModel.run_id == run_id, XComModel.key.in_((RESULT, FAILURE))
    )
    values = ((row, XComModel.deserialize_value(row)) for row in session.scalars(query))
    return {
        (row.task_id, row.map_index): value for row, value in values if isinstance(value, dict) and "stage" in value
    }


def _findings(value: Any) -> Iterable[Finding]:
    """The rows that are findings. An older version may have written others."""
    for row in value if isinstance(value, list) else []:
        try:
            yield Finding.model_validate(row)
        except ValidationError:
            continue
