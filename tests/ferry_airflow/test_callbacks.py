"""What is called when a run ends or is late."""

import asyncio
import sys
from types import ModuleType

import pytest

from ferry_airflow.callbacks import on_deadline, on_failure, on_success

CALLS = {"FERRY_ON_SUCCESS": on_success, "FERRY_ON_FAILURE": on_failure, "FERRY_ON_DEADLINE": on_deadline}
CONTEXT = {"run_id": "manual__1", "reason": "task_failure"}


def call(variable):
    if variable == "FERRY_ON_DEADLINE":
        asyncio.run(on_deadline(context=CONTEXT))
    else:
        CALLS[variable](CONTEXT)


@pytest.fixture
def told(monkeypatch):
    calls = []
    module = ModuleType("of_ones_own")
    module.tell, module.broken = calls.append, lambda context: 1 / 0
    monkeypatch.setitem(sys.modules, "of_ones_own", module)
    return calls


@pytest.mark.parametrize("variable", CALLS)
def test_function_of_ones_own_gets_the_context(variable, told, monkeypatch):
    call(variable)
    assert told == []  # none is configured
    monkeypatch.setenv(variable, "of_ones_own:tell")
    call(variable)
    assert told == [CONTEXT]


@pytest.mark.parametrize("name", ["of_ones_own:broken", "of_ones_own:none", "nowhere:at_all", "no colon"])
def test_one_that_cannot_be_called_is_logged(name, told, monkeypatch, caplog):
    monkeypatch.setenv("FERRY_ON_FAILURE", name)
    on_failure(CONTEXT)
    assert f"Calling FERRY_ON_FAILURE={name} failed" in caplog.text
