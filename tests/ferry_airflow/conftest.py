"""Operators are run in this process, without a scheduler; only their ferry commands are processes."""

import os
import sys
import tempfile
from types import SimpleNamespace

from tests.support.paths import ROOT

# Airflow makes its home directory when it is imported: not in the user's.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-home-"))
os.environ.setdefault("AIRFLOW__CORE__UNIT_TEST_MODE", "True")

import pytest

from ferry_airflow.execution.base import StageCommand, TaskIdentity
from ferry_airflow.execution.local import LocalSubprocess

SCRIPT = ROOT / "tests" / "support" / "fake_ferry.py"
TASK = TaskIdentity("dag", "manual__1", "t", -1)


def ferry(*arguments):
    return StageCommand(arguments)


class RecordingLog:
    """A task log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def info(self, event, *args):
        self.lines.append(("info", event % args))

    def error(self, event, *args):
        self.lines.append(("error", event % args))


@pytest.fixture
def log():
    return RecordingLog()


@pytest.fixture(autouse=True)
def work_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FERRY_WORK_DIR", str(tmp_path / "work"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "work"


@pytest.fixture
def fake():
    """An execution mode that runs `fake_ferry.py <behaviour>` instead of ferry."""

    def make(behaviour, **options):
        return LocalSubprocess([sys.executable, str(SCRIPT), behaviour], **options)

    return make


@pytest.fixture
def context():
    pushed = {}
    ti = SimpleNamespace(map_index=-1, dag_id="dag", task_id="t", pushed=pushed, xcom_push=pushed.__setitem__)
    return {"run_id": "manual__1", "ti": ti}
