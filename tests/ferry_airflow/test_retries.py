"""Which errors of a stage are retried, and after how long: mapped or not, whatever policy is passed."""

import json
import math
from datetime import timedelta

import pytest
from airflow.sdk.definitions.retry_policy import RetryAction, RetryDecision, RetryPolicy
from airflow.sdk.exceptions import AirflowFailException

from conversion_lib.errors import BadInput, CheckFailed, OutsideFailure, Terminated
from ferry_airflow.approval import REJECTED, OptionalApprovalOperator
from ferry_airflow.check import CheckOperator
from ferry_airflow.convert import ConvertOperator
from ferry_airflow.download import DownloadOperator
from ferry_airflow.execution.base import ExecutionMode, StageFailed
from ferry_airflow.retries import LONGEST, StageRetryPolicy


@pytest.fixture
def source():
    """The manifest of a downloaded checkpoint."""
    return {"repo": "acme/tiny", "commit": "c0ffee", "path": "/w/hf", "work_dir": "/w", "quantized": True}


class TestRetries:
    @pytest.mark.parametrize("error", [BadInput("no such repository"), CheckFailed("max KL 0.5")])
    def test_never(self, error):
        assert StageRetryPolicy().evaluate(error, 1, 3).action is RetryAction.FAIL

    @pytest.mark.parametrize("error", [OutsideFailure("503"), Terminated("SIGTERM"), RuntimeError("?")])
    def test_later_each_time_and_never_together(self, error, monkeypatch):
        monkeypatch.setenv("FERRY_RETRY_SECONDS", "10")
        for number in range(1, 4):
            delays = [StageRetryPolicy().evaluate(error, number, 9).retry_delay.total_seconds() for _ in range(20)]
            whole = 10 * 2 ** (number - 1)
            assert whole / 2 <= min(delays) < max(delays) <= whole
        assert StageRetryPolicy().evaluate(error, 30, 99).retry_delay <= LONGEST


class Always(RetryPolicy):
    """A team's own policy, which retries whatever happened."""

    def evaluate(self, exception, try_number, max_tries, context=None):
        return RetryDecision.retry(timedelta(seconds=1))


@pytest.mark.parametrize(
    "given", [{}, {"retry_policy": None}, {"retry_policy": Always()}], ids=["default", "none", "own"]
)
@pytest.mark.parametrize("mapped", [False, True])
class TestPolicy:
    """Mapped or not, and whatever is passed."""

    def make(self, operator, mapped, given, **arguments):
        if not mapped:
            return operator(task_id="t", **arguments, **given)
        name, value = arguments.popitem()
        return operator.partial(task_id="t", **arguments, **given).expand(**{name: [value]}).unmap({name: value})

    @pytest.mark.parametrize(("code", "kind"), [(1, CheckFailed), (2, BadInput)])
    def test_final_errors_ask_no_policy(self, context, source, fake, mapped, given, code, kind):
        arguments = {"execution": fake("fail_with_repo"), "source": {**source, "repo": str(code)}}
        operator = self.make(DownloadOperator, mapped, given, **arguments)
        with pytest.raises(AirflowFailException) as caught:
            operator.execute(context)
        assert isinstance(caught.value, kind)

    def test_policy_of_other_errors(self, mapped, given, source):
        own = given.get("retry_policy")
        stage = self.make(ConvertOperator, mapped, given, source=source, part="0/1")
        asks = self.make(OptionalApprovalOperator, mapped, given, body="b", subject="s")
        assert type(stage.retry_policy) is (type(own) if own else StageRetryPolicy)
        assert asks.retry_policy is (own or REJECTED)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_check_that_finds_no_number_tells_its_verdict(context, source, work_dir, number):
    """Also of an image that prints NaN: Airflow refuses an XCom that is not valid JSON."""

    class Failing(ExecutionMode):
        def run(self, command, secrets, task, log):
            figures = {"verdict": "fail", "max_kl": number, "top1": 0.0}
            raise StageFailed("ferry: logits: fail", 1, figures)

        def kill(self):
            pass

    operator = CheckOperator(
        task_id="check", checkpoint={**source, "path": "/w/x"}, reference="/r", execution=Failing()
    )
    with pytest.raises(CheckFailed, match="logits: fail"):
        operator.execute(context)
    left = json.loads(json.dumps(context["ti"].pushed["failure"], allow_nan=False))
    assert (left["verdict"], float(left["max_kl"]), left["top1"]) == ("fail", pytest.approx(number, nan_ok=True), 0.0)
    assert json.loads((work_dir / "runs" / "dag@manual__1" / "check.json").read_text())["max_kl"] == left["max_kl"]
