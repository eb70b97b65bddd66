"""Whether a stage is retried, and after how long: this depends on the type of the error."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryDecision, RetryRule
from airflow.sdk.exceptions import AirflowFailException

from conversion_lib.errors import BadInput, CheckFailed, FerryError
from ferry_airflow.settings import number

if TYPE_CHECKING:
    from airflow.sdk import Context

DELAY_VARIABLE = "FERRY_RETRY_SECONDS"
"""In the environment of workers and DAG processor: seconds to wait before the first retry; default 30."""

LONGEST = timedelta(minutes=10)


def first_delay() -> timedelta:
    """Returns the wait before the first retry.

    Raises:
        BadInput: FERRY_RETRY_SECONDS is not a number from 0 to a million.
    """
    return timedelta(seconds=number(DELAY_VARIABLE, 30, "seconds"))


def stage_defaults() -> dict[str, Any]:
    """Returns `default_args` for a DAG of stages: three retries.

    The delays given here apply if a task's process ends without an exception, such as a killed one. Otherwise the
    operators' StageRetryPolicy decides.

    Raises:
        BadInput: FERRY_RETRY_SECONDS is not a number from 0 to a million.
    """
    return {
        "owner": "ferry",
        "retries": 3,
        "retry_delay": first_delay(),
        "retry_exponential_backoff": 2,
        "max_retry_delay": LONGEST,
    }


class FinalBadInput(BadInput, AirflowFailException):
    """Wrong input, as a stage raises it: Airflow asks no retry policy."""


class FinalCheckFailed(CheckFailed, AirflowFailException):
    """A failed check, as a stage raises it: Airflow asks no retry policy."""


def final(error: type[FerryError]) -> type[FerryError]:
    """Returns the class to raise for an error, which Airflow does not retry if a retry would fail in the same way."""
    if issubclass(error, AirflowFailException):
        return error
    if issubclass(error, BadInput):
        return FinalBadInput
    return FinalCheckFailed if issubclass(error, CheckFailed) else error


class StageRetryPolicy(ExceptionRetryPolicy):
    """Fails at once for wrong input and a failed check. Retries after any other error, with growing waits.

    The wait doubles with each try, up to ten minutes. It is shortened at random by up to a half, so that the runs that
    one outage ended do not all retry at the same moment.
    """

    def __init__(self) -> None:
        super().__init__(
            rules=[
                RetryRule(BadInput, RetryAction.FAIL, reason="wrong input: a retry would fail in the same way"),
                RetryRule(CheckFailed, RetryAction.FAIL, reason="the check failed: a retry would fail in the same way"),
            ],
            default=RetryAction.RETRY,
        )

    def evaluate(
        self, exception: BaseException, try_number: int, max_tries: int, context: Context | None = None
    ) -> RetryDecision:
        decision = super().evaluate(exception, try_number, max_tries, context)
        if decision.action is RetryAction.FAIL:
            return decision
        whole = min(first_delay() * 2 ** (try_number - 1), LONGEST)
        delay = whole * random.uniform(0.5, 1)  # noqa: S311 - spreads retries, keeps no secret
        return RetryDecision.retry(delay, reason=f"retry in {delay.total_seconds():.0f} s")
