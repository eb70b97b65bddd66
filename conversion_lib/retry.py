"""Trying again what may pass: exponential back-off with jitter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from conversion_lib.errors import OutsideFailure
from conversion_lib.progress import SILENT, Reporter

Value = TypeVar("Value")


class Passing(OutsideFailure):
    """A failure that may be over soon: what `Backoff` tries again."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between tries: exponential from `first_seconds`, with as much jitter, at most `longest_seconds`."""

    attempts: int = 6
    first_seconds: float = 1.0
    longest_seconds: float = 60.0

    def run(
        self, work: Callable[[], Value], *, stopped: threading.Event | None = None, reporter: Reporter = SILENT
    ) -> Value:
        """`work()`, tried again where it raises Passing, until `stopped` is set; the last failure is raised."""
        stopped = stopped or threading.Event()

        def tell(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            pause = state.next_action.sleep if state.next_action else 0.0
            reporter.say(f"{error}; try {state.attempt_number + 1} of {self.attempts} in {pause:.1f} s")

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Passing),
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_when_event_set(stopped),
            wait=tenacity.wait_exponential(self.first_seconds, self.longest_seconds)
            + tenacity.wait_random(0, self.first_seconds),
            sleep=tenacity.sleep_using_event(stopped),
            before_sleep=tell,
            reraise=True,
        )
        return retrying(work)
