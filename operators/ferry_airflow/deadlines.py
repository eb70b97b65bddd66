"""When a run is late: counted from the moment that Airflow creates the run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk.definitions.deadline import BaseDeadlineReference


class RunCreatedDeadline(BaseDeadlineReference):
    """The time when a run is created. Airflow evaluates it then, and finds it through the package's plugin.

    Airflow's own DAGRUN_QUEUED_AT is nearly the same time, but Airflow 3.3.2 recalculates it when a run is cleared, and
    fails: no run with such a deadline can be cleared.
    """

    def _evaluate_with(self, **kwargs: Any) -> datetime:
        return datetime.now(UTC)
