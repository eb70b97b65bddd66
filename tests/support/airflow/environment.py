"""Airflow for the tests of the DAGs: its settings, one migrated home for the session, and the installed package."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.environments import build_wheel, install, make_environment
from tests.support.paths import ROOT


def airflow_environment(home):
    """What the child's Airflow sees: nothing of the settings around the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "FERRY_", "HF_"))}
    return {
        **kept,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@pytest.fixture(scope="session")
def airflow_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("airflow")
    command = [sys.executable, "-m", "airflow", "db", "migrate"]
    subprocess.run(command, env=airflow_environment(home), check=True, capture_output=True)
    return home


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The distribution as it goes to the index."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def fresh(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel, and with what its extras for Airflow declare."""
    return make_environment(tmp_path_factory.mktemp("fresh"), wheel, "airflow", "kubernetes")


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The wheel as `pip install` lays it out, in a directory for PYTHONPATH."""
    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="session")
def installed_bundle(installed):
    """Airflow's settings for the DAGs of `installed`, as deploy/airflow.env has them."""
    return {**bundles(installed / "ferry_airflow" / "dags"), "PYTHONPATH": str(installed)}


def bundles(ferry_dags, **others):
    """Airflow's setting for Ferry's DAG files at that path, as deploy/airflow.env has it, and for bundles beside it."""
    lines = (ROOT / "deploy" / "airflow.env").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST=")]
    name, value = line.replace("/opt/ferry/dags", str(ferry_dags)).split("=", 1)
    (ferry,) = json.loads(value)
    own = [{**ferry, "name": other, "kwargs": {"path": str(path)}} for other, path in others.items()]
    return {name: json.dumps([ferry, *own])}
