"""Airflow for the tests of the DAGs: its settings, one migrated home for the session, and the installed package."""

import os
import shutil
import subprocess
import sys

import pytest

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
def installed(tmp_path_factory):
    """The package as `pip install` lays it out, in a directory for PYTHONPATH."""
    source, target = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("conversion_lib", "operators", "dags"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


@pytest.fixture(scope="session")
def installed_bundle(installed):
    """Airflow's settings for the DAGs of `installed`, as deploy/airflow.env has them."""
    lines = (ROOT / "deploy" / "airflow.env").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST=")]
    name, value = line.replace("/opt/ferry/dags", str(installed / "dags")).split("=", 1)
    return {name: value, "PYTHONPATH": str(installed)}
