"""Airflow for the tests of the DAGs: one migrated home for the session, and runs in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dags.scheduled import scheduled  # noqa: F401 - a fixture
from tests.dags.standalone import standalone, standalone_hub  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]


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


class Onboarding:
    """Runs `onboard_checkpoint`, or another DAG, in a process that stays: importing Airflow takes longer than a run.

    `environment` is set in it before each run; `log` is what the last run wrote.
    """

    def __init__(self, home, directory, environment):
        self.environment, self.log = {}, ""
        self._answers, self._log = directory / "answers", directory / "log"
        self._answers.touch()
        self._answers_read = 0
        self._log_file = self._log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "run_onboarding.py"), str(self._answers)],
            env={**airflow_environment(home), **environment},
            stdin=subprocess.PIPE,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, conf, *, dag="onboard_checkpoint", retry_seconds=0.1, environment=(), **request):
        log_read = self._log.stat().st_size
        request |= {"dag": dag, "conf": conf, "retry_seconds": retry_seconds}
        request["environment"] = {**self.environment, **dict(environment)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._next_answer()
        with self._log.open() as log:
            log.seek(log_read)
            self.log = log.read()
        return json.loads(line)

    def _next_answer(self):
        while True:
            ended = self._process.poll() is not None
            lines = self._answers.read_text().splitlines(keepends=True)
            if len(lines) > self._answers_read and lines[-1].endswith("\n"):
                self._answers_read += 1
                return lines[-1]
            assert not ended, self._log.read_text()[-8000:]
            time.sleep(0.05)

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._log_file.close()


def manifests(answer):
    """The manifest that each stage of a run left, by stage."""
    return {stage: task.get("xcom", {}).get("return_value") for stage, task in answer["tasks"].items()}
