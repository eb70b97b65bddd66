"""What Airflow finds of the package once it is installed: provider, links, the plugin that makes pools."""

import json
import os
import subprocess
import sys

import pytest
from airflow.jobs.job import Job

from operators import setup, setup_plugin
from operators.provider import get_provider_info

LOOK = """
import json
from airflow.providers_manager import ProvidersManager
manager = ProvidersManager()
found = manager.providers["ferry"].data
print(json.dumps([found["name"], [plugin.plugin_class for plugin in manager.plugins], manager.extra_links_class_names]))
"""


def test_airflow_takes_the_package_for_a_provider(tmp_path):
    """In Airflow's own way: by the entry point of an installed distribution, checked against its schema."""
    installed = tmp_path / "ferry-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: ferry\nVersion: 0.1.0\n")
    entry = "[apache_airflow_provider]\nprovider_info = operators.provider:get_provider_info\n"
    (installed / "entry_points.txt").write_text(entry)
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    name, plugins, links = json.loads(done.stdout.splitlines()[-1])
    assert name == "Ferry"
    assert "operators.setup_plugin.SetupPlugin" in plugins
    assert "operators.base.OutputLink" in links


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
        text = (setup.POOLS.parents[1] / "dags" / f"{dag}.py").read_text()
        assert any(f'"{pool}"' in text for pool in pools)
    assert all(pool["slots"] > 0 for pool in pools.values())
