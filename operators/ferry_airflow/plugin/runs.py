"""A DAG run as the pages see it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One task instance of a run, and its manifest.

    Attributes:
        map_index: -1 if the task is not mapped.
        state: As in Airflow; None before it is scheduled.
        started: With time zone; None before the first try.
        ended: With time zone; None while it runs.
        manifest: Also of a failed stage; None if there is none yet.
    """

    task_id: str
    map_index: int
    state: str | None
    tries: int
    started: datetime | None
    ended: datetime | None
    manifest: dict[str, Any] | None


@dataclass(frozen=True)
class Run:
    """A DAG run.

    Attributes:
        conf: The params that the run was started with.
        stages: In order of their start; those not started yet come last.
    """

    dag_id: str
    run_id: str
    state: str
    conf: dict[str, Any]
    stages: list[Stage]

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Returns the manifest of the first stage of a kind, such as `publish`; None if there is none."""
        left = (one.manifest for one in self.stages if one.manifest and one.manifest.get("stage") == stage)
        return next(left, None)
