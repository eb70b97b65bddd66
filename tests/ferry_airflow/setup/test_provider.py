"""What Airflow is told of the package, and the plugin that makes pools."""

import json

import pytest
from airflow.jobs.job import Job

from ferry_airflow.setup import plugin as setup_plugin
from ferry_airflow.setup import pools as setup
from ferry_airflow.setup.provider import get_provider_info
from tests.support.paths import DAGS


def test_version_is_the_packages():
    import conversion_lib

    assert get_provider_info()["versions"] == [conversion_lib.__version__]


@pytest.fixture
def made(monkeypatch):
    calls = []
    monkeypatch.setattr(setup_plugin, "create_missing_pools", lambda: calls.append(1) or [])
    return calls


def test_pools_are_made_when_a_component_with_the_database_starts(made):
    setup_plugin.on_starting(Job.__new__(Job))
    assert made == [1]


def test_tasks_do_not_make_pools(made):
    setup_plugin.on_starting(object())
    assert made == []


def test_pools_are_those_of_the_dags():
    pools = json.loads(setup.POOLS.read_text())
    for dag in ("onboard_checkpoint", "export_checkpoint"):
        text = (DAGS / f"{dag}.py").read_text()
        assert any(f'"{pool}"' in text for pool in pools)
    assert all(pool["slots"] > 0 for pool in pools.values())
