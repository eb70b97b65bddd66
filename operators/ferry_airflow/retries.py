"""When a stage is tried again, and how long it waits: by the type of what went wrong."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryDecision, RetryRule

from conversion_lib.errors import BadInput, CheckFailed
from ferry_airflow.settings import number

if TYPE_CHECKING:
    from airflow.sdk import Context

DELAY_VARIABLE = "FERRY_RETRY_SECONDS"
"""In the environment of workers and DAG processor: the wait before the first retry, in seconds; default 30."""

LONGEST = timedelta(minutes=10)


def first_delay() -> timedelta:
    """The wait before the first retry."""
    return timedelta(seconds=number(DELAY_VARIABLE, 30, "seconds"))


def stage_defaults() -> dict[str, Any]:
    """`default_args` of a DAG of stages: three retries. Their delays are for a task whose process ended without a word;
    for all else the operators have StageRetryPolicy."""
    return {
        "owner": "ferry",
        "retries": 3,
        "retry_delay": first_delay(),
        "retry_exponential_backoff": 2,
        "max_retry_delay": LONGEST,
    }


class StageRetryPolicy(ExceptionRetryPolicy):
    """Wrong input and a failed check fail at once; all else is tried again, later each time.

    The wait doubles from try to try, to ten minutes at most, and a random half of it is left out: runs that one outage
    ended do not all come back at the same moment.
    """

    def __init__(self) -> None:
        super().__init__(
            rules=[
                RetryRule(BadInput, RetryAction.FAIL, reason="wrong input: another try would end the same way"),
                RetryRule(CheckFailed, RetryAction.FAIL, reason="the check failed: another try would end the same way"),
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
        return RetryDecision.retry(delay, reason=f"tried again in {delay.total_seconds():.0f} s")
