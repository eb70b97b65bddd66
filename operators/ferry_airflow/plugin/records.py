"""What Airflow's database knows of Ferry's runs: all that the API server can see of them, as it sees no worker's disk.

These tables of Airflow are no public interface (3.3.2); nothing else of the plugin knows them.
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
"""XCom keys under which a stage leaves its manifest: when it succeeded, and when it failed."""
LOOKS, ONBOARDINGS = 1000, 3000
"""Rows of XCom that the page of all models is made of at most, the newest ones."""


def read_run(dag_id: str, run_id: str) -> Run | None:
    """A run; None where there is none."""
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
                started=ti.start_date if ti.try_number else None,  # Airflow dates what it leaves out, too
                ended=ti.end_date,
                manifest=left.get((ti.task_id, ti.map_index)),
            )
            for ti in ordered
        ]
        return Run(dag_id, run_id, str(run.state), dict(run.conf or {}), stages)


def read_findings(dag_id: str) -> list[tuple[datetime, Finding]]:
    """What the runs of `scheduled_onboarding` have found, the oldest first."""
    with create_session(scoped=False) as session:
        rows = _newest(session, dag_id, ROWS, LOOKS)
        return [(row.timestamp, found) for row in rows for found in _findings(XComModel.deserialize_value(row))]


def read_onboardings(dag_id: str) -> dict[str, tuple[datetime, dict[str, dict[str, Any]]]]:
    """By run id, the oldest first: when its last stage ended, and each stage's manifest."""
    runs: dict[str, tuple[datetime, dict[str, dict[str, Any]]]] = {}
    with create_session(scoped=False) as session:
        for row in _newest(session, dag_id, RESULT, ONBOARDINGS):
            value = XComModel.deserialize_value(row)
            if isinstance(value, dict) and "stage" in value:
                stages = runs[row.run_id][1] if row.run_id in runs else {}
                runs[row.run_id] = (row.timestamp, {**stages, str(value["stage"]): value})
    return runs


def _order(ti: TaskInstance) -> tuple[bool, float, int, int]:
    """By their starts; those that have not started come last, upstream ones first (they weigh more)."""
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
    """Of rows that an older version wrote, those that still are findings."""
    for row in value if isinstance(value, list) else []:
        try:
            yield Finding.model_validate(row)
        except ValidationError:
            continue
