"""The stage `approval`: a person sees the verdict and approves before publishing. Skipped unless the run wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.exceptions import HITLRejectException
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryRule
from airflow.sdk.exceptions import AirflowSkipException

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.definitions.retry_policy import RetryPolicy


REJECTED = ExceptionRetryPolicy([RetryRule(HITLRejectException, RetryAction.FAIL, reason="rejected by a person")])


class OptionalApprovalOperator(ApprovalOperator):
    """Waits until a person approves or rejects, under Airflow's Required Actions. A rejection is not retried.

    If an answer arrives before the scheduler of Airflow 3.3.2 knows of the question, it takes the task for dead, and a
    retry asks again. The tasks that follow need a trigger rule that accepts a skipped task. Parameters not listed here
    are as in Airflow's ApprovalOperator; `fail_on_reject` is always True.

    :param wanted: whether to ask (templated); default True. If False, the task is skipped
    :param subject: the question (templated)
    :param body: what the person needs to know, in Markdown (templated)
    :param retry_policy: default, and for None: only a rejection is final
    """

    template_fields: Sequence[str] = ("wanted", *ApprovalOperator.template_fields)

    def __init__(self, *, wanted: bool = True, retry_policy: RetryPolicy | None = REJECTED, **kwargs: Any) -> None:
        super().__init__(fail_on_reject=True, retry_policy=retry_policy or REJECTED, **kwargs)
        self.wanted = wanted

    def execute(self, context: Context) -> Any:
        if not self.wanted:
            raise AirflowSkipException("this run needs no approval")
        return super().execute(context)
