"""A DAG run as the pages see it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One task instance of a run, and the manifest it left; times are aware."""

    task_id: str
    map_index: int
    state: str | None
    tries: int
    started: datetime | None
    ended: datetime | None
    manifest: dict[str, Any] | None


@dataclass(frozen=True)
class Run:
    """A DAG run with its stages, in their order."""

    dag_id: str
    run_id: str
    state: str
    conf: dict[str, Any]
    stages: list[Stage]

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest that the stage of this kind left."""
        left = (one.manifest for one in self.stages if one.manifest and one.manifest.get("stage") == stage)
        return next(left, None)
