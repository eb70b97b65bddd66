"""Retries of temporary failures: exponential backoff with jitter."""

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
    """A temporary failure, which `Backoff` retries.

    Args:
        message: As for any FerryError.
        after_seconds: How long the service asked to wait, such as in Retry-After. 0: it did not ask.
    """

    def __init__(self, message: str, after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.after_seconds = after_seconds


MOST_ASKED_SECONDS = 600.0
"""Longest wait that a service can ask for."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Retries with exponential waits from `first_seconds` to `longest_seconds`, plus jitter of up to `first_seconds`.

    The wait is longer if a failure asks for it. `attempts` includes the first try.
    """

    attempts: int = 6
    first_seconds: float = 1.0
    longest_seconds: float = 60.0

    def run(
        self, work: Callable[[], Value], *, stopped: threading.Event | None = None, reporter: Reporter = SILENT
    ) -> Value:
        """Calls `work`, again if it raises Passing, and returns its result.

        Args:
            work: What to try.
            stopped: Once it is set, there are no more tries, and a wait ends.
            reporter: Told of each failure and the wait after it.

        Raises:
            Passing: Every try failed. It is the last failure. Other errors of `work` are raised at once.
        """
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
