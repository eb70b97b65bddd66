"""Waiting for another run that works at the same place: the task is deferred, which takes no worker and no retry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from airflow.triggers.base import BaseTrigger, TriggerEvent

from conversion_lib.errors import FerryError, OutsideFailure
from ferry_airflow.retries import first_delay
from ferry_airflow.settings import number

HOURS_VARIABLE = "FERRY_WAIT_HOURS"
"""In the environment of the workers: how long a task waits for another run; default 24; 0: it fails."""

TRY_AGAIN = "try_again"
"""The operator's method that gets the trigger's event and the time since when the task waits (Unix time)."""


class WaitedTooLong(OutsideFailure, AirflowFailException):
    """Another run still works at the same place. Airflow does not retry, which would wait as long again."""


class PauseTrigger(BaseTrigger):
    """Fires after some seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{type(self).__module__}.{type(self).__qualname__}", {"seconds": self.seconds}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        await asyncio.sleep(self.seconds)
        yield TriggerEvent({})  # type: ignore[no-untyped-call]


def wait_for(error: FerryError, holder: str, since: float | None, log: Any) -> TaskDeferred:
    """Returns what a task raises to wait for another run.

    Args:
        error: What the command said.
        holder: Who works there.
        since: When the task began to wait, in Unix time. None: it begins now.
        log: The task's log.

    Raises:
        BadInput: FERRY_WAIT_HOURS or FERRY_RETRY_SECONDS is not a number from 0 to a million.
        WaitedTooLong: The task has waited for FERRY_WAIT_HOURS.
    """
    hours = number(HOURS_VARIABLE, 24, "hours")
    began = time.time() if since is None else since
    if time.time() - began >= hours * 3600:
        advice = f"end that run, or raise {HOURS_VARIABLE}, and clear this task"
        raise WaitedTooLong(f"waited {hours:g} h for {holder}: {advice}; {error}")
    pause = max(first_delay().total_seconds(), 1)
    log.info("Waiting for %s: next look in %d s, for %g h at most", holder, pause, hours)
    return TaskDeferred(trigger=PauseTrigger(pause), method_name=TRY_AGAIN, kwargs={"since": began})
