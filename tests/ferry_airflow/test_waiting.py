"""A stage whose place another run works at waits, says for whom, and spends no retry. tests/dags lets one wait."""

import asyncio
import time

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred

from conversion_lib.errors import BadInput, OutsideFailure
from ferry_airflow.convert import ConvertOperator
from ferry_airflow.execution.base import ExecutionMode, StageFailed
from ferry_airflow.waiting import PauseTrigger

OTHER = "convert of run manual__2 of onboard_checkpoint, process 7 on worker-1"


class Busy(ExecutionMode):
    def run(self, command, secrets, task, log):
        raise StageFailed("ferry: another run is at work in /w/x/.ferry", 3, {"waits_for": OTHER})

    def resume(self, command, secrets, event, log):
        return Busy.run(self, command, secrets, None, log)

    def kill(self):
        pass


class InPod(Busy):
    def run(self, command, secrets, task, log):
        raise TaskDeferred(trigger=PauseTrigger(0), method_name="resume")


def operator(mode=None):
    return ConvertOperator(task_id="t", source="/s", destination="/w/x", execution=mode or Busy())


def test_waits_and_says_for_whom(context, capfd):
    with pytest.raises(TaskDeferred) as first:
        operator().execute(context)
    assert OTHER in "".join(capfd.readouterr())
    assert context["ti"].pushed == {}  # it has not failed
    with pytest.raises(TaskDeferred) as second:
        getattr(operator(), first.value.method_name)(context, event={}, **first.value.kwargs)
    assert second.value.kwargs == first.value.kwargs


def test_a_pod_waits_as_long(context):
    """Its own deferrals come between: what the task has waited so far is not forgotten."""
    began = time.time() - 60
    with pytest.raises(TaskDeferred) as pod:
        operator(InPod()).try_again(context, {}, since=began)
    with pytest.raises(TaskDeferred) as waiting:
        getattr(operator(InPod()), pod.value.method_name)(context, event={}, **pod.value.kwargs)
    assert (waiting.value.method_name, waiting.value.kwargs) == ("try_again", {"since": began})


def test_not_for_ever(context, monkeypatch):
    monkeypatch.setenv("FERRY_WAIT_HOURS", "2")
    with pytest.raises(TaskDeferred):
        operator().try_again(context, {}, since=time.time() - 7100)
    with pytest.raises(
        AirflowFailException, match=r"^waited 2 h for convert of run manual__2 .*clear this task"
    ) as late:
        operator().try_again(context, {}, since=time.time() - 7300)
    assert isinstance(late.value, OutsideFailure)
    assert context["ti"].pushed["failure"]["exit_code"] == 3


def test_hours_that_are_no_number(context, monkeypatch):
    monkeypatch.setenv("FERRY_WAIT_HOURS", "some")
    with pytest.raises(BadInput, match="FERRY_WAIT_HOURS is 'some'"):
        operator().execute(context)


def test_trigger_fires_after_its_seconds():
    path, arguments = PauseTrigger(0.01).serialize()
    assert (path, arguments) == ("ferry_airflow.waiting.PauseTrigger", {"seconds": 0.01})
    assert asyncio.run(anext(PauseTrigger(**arguments).run())).payload == {}
