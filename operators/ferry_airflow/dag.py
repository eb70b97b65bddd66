"""The DAG class of Ferry's DAGs: a deadline for each run, and `airflow dags test` in spite of it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert

from ferry_airflow.callbacks import on_deadline
from ferry_airflow.deadlines import RunCreatedDeadline
from ferry_airflow.settings import number

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

HOURS_VARIABLE = "FERRY_DEADLINE_HOURS"
"""In the environment of the DAG processor: hours from when a run is created; default 24; 0: no deadline."""


class StagesDag(DAG):
    """Airflow's DAG with another `test`.

    In Airflow 3.3.2, `test` fails at the end of a DAG that has a deadline: it takes the definition for the id of a row.
    It also cannot call the callbacks of a run if a param has no default. So a test run has neither.
    """

    def test(self, *args: Any, **kwargs: Any) -> DagRun:
        """Runs the DAG as Airflow's `test` does, without deadline and callbacks."""
        self.deadline = self.on_success_callback = self.on_failure_callback = None
        self.has_on_success_callback = self.has_on_failure_callback = False
        run: DagRun = super().test(*args, **kwargs)
        return run


def deadline() -> DeadlineAlert | None:
    """Returns the alert for a late run, which continues; None if FERRY_DEADLINE_HOURS is 0.

    Raises:
        BadInput: FERRY_DEADLINE_HOURS is not a number from 0 to a million.
    """
    hours = number(HOURS_VARIABLE, 24, "hours")
    if not hours:
        return None
    return DeadlineAlert(
        reference=RunCreatedDeadline(),
        interval=timedelta(hours=hours),
        callback=AsyncCallback(on_deadline),
    )
