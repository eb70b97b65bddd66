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
    """A failure that may be over soon: what `Backoff` tries again.

    after_seconds: how long whoever failed has asked to be left alone.
    """

    def __init__(self, message: str, after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.after_seconds = after_seconds


MOST_ASKED_SECONDS = 600.0
"""Who asks to be left alone for longer is asked again after so long."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between tries: exponential from `first_seconds`, with as much jitter, at most `longest_seconds`.

    Longer where a failure says how long to wait.
    """

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

        growing = tenacity.wait_exponential(self.first_seconds, self.longest_seconds) + tenacity.wait_random(
            0, self.first_seconds
        )

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.after_seconds if isinstance(error, Passing) else 0.0
            return max(growing(state), min(asked, MOST_ASKED_SECONDS))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Passing),
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_when_event_set(stopped),
            wait=pause,
            sleep=tenacity.sleep_using_event(stopped),
            before_sleep=tell,
            reraise=True,
        )
        return retrying(work)
