"""The stage `approval`: a person looks at the verdict before anything is published. It is skipped unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.exceptions import HITLRejectException
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryRule
from airflow.sdk.exceptions import AirflowSkipException

if TYPE_CHECKING:
    from airflow.sdk import Context


class OptionalApprovalOperator(ApprovalOperator):
    """Waits for a person to approve or to reject, in Airflow's Required Actions; a rejection fails the task for good.

    The scheduler of Airflow 3.3.2 takes an answer that comes before it has heard of the question for a task that died:
    the retries of the task ask again. What follows needs a trigger rule under which a skipped task is none that failed.

    :param wanted: whether to ask at all (templated); default True; where not, the task is skipped
    :param subject: the question (templated)
    :param body: what the person is to know, in Markdown (templated)
    """

    template_fields: Sequence[str] = ("wanted", *ApprovalOperator.template_fields)

    def __init__(self, *, wanted: bool = True, **kwargs: Any) -> None:
        rejected = RetryRule(HITLRejectException, RetryAction.FAIL, reason="a person has said no")
        super().__init__(fail_on_reject=True, **{"retry_policy": ExceptionRetryPolicy([rejected]), **kwargs})
        self.wanted = wanted

    def execute(self, context: Context) -> Any:
        if not self.wanted:
            raise AirflowSkipException("no approval was asked for")
        return super().execute(context)
