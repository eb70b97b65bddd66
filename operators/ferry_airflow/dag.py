"""The DAG of a run of stages: how late it may be, and that `airflow dags test` can run it all the same."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from ferry_airflow.callbacks import on_deadline
from ferry_airflow.settings import number

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

HOURS_VARIABLE = "FERRY_DEADLINE_HOURS"
"""In the environment of the DAG processor: hours from when a run is queued; default 24; 0: no deadline."""


class StagesDag(DAG):
    """Airflow's DAG, but for its `test`.

    `test` of Airflow 3.3.2 fails at the end of a DAG that has a deadline (it takes the definition for the id of a row),
    and cannot call what is called at the end of a run where a param has no default. A test run does without them.
    """

    def test(self, *args: Any, **kwargs: Any) -> DagRun:
        self.deadline = self.on_success_callback = self.on_failure_callback = None
        self.has_on_success_callback = self.has_on_failure_callback = False
        run: DagRun = super().test(*args, **kwargs)
        return run


def deadline() -> DeadlineAlert | None:
    """What tells of a run that takes long; the run goes on."""
    hours = number(HOURS_VARIABLE, 24, "hours")
    if not hours:
        return None
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=hours),
        callback=AsyncCallback(on_deadline),
    )
