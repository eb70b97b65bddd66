"""How long a run may take before somebody is told. tests/dags/test_postgresql.py lets one be late."""

from datetime import timedelta

import pytest

from conversion_lib.errors import BadInput
from ferry_airflow.callbacks import on_deadline
from ferry_airflow.dag import deadline
from ferry_airflow.setup.plugin import SetupPlugin


@pytest.mark.parametrize(("hours", "expected"), [(None, 24), ("", 24), ("1.5", 1.5)])
def test_hours_of_the_environment(hours, expected, monkeypatch):
    monkeypatch.delenv("FERRY_DEADLINE_HOURS", raising=False)
    if hours is not None:
        monkeypatch.setenv("FERRY_DEADLINE_HOURS", hours)
    alert = deadline()
    assert alert.interval == timedelta(hours=expected)
    # a run with Airflow's own reference cannot be cleared; tests/dags/test_in_airflow.py clears runs
    assert type(alert.reference) in SetupPlugin.deadline_references
    assert alert.callback.path.endswith(on_deadline.__name__)


@pytest.mark.parametrize("wrong", ["soon", "-1", "inf", "nan", "1e9"])
def test_what_is_no_number_of_hours(wrong, monkeypatch):
    monkeypatch.setenv("FERRY_DEADLINE_HOURS", wrong)
    with pytest.raises(BadInput, match=f"FERRY_DEADLINE_HOURS is '{wrong}': expected a number of hours"):
        deadline()


def test_none_is_wanted(monkeypatch):
    monkeypatch.setenv("FERRY_DEADLINE_HOURS", "0")
    assert deadline() is None
