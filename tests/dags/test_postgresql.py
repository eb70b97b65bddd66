"""The package as it is installed, in an Airflow on PostgreSQL with the LocalExecutor: as it runs in earnest.

Its runs have a deadline of a few seconds, so that all are late; functions of one's own are told what became of them.
"""

import json
import os
from urllib.parse import quote

import pytest

from tests.support.airflow.postgresql import programs, running_postgresql
from tests.support.airflow.standalone import REPO, running_standalone

DAG = "onboard_checkpoint"
BUNDLES = "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST"
OF_ONES_OWN = """
import json, os


def _tell(what, context):
    run = context["dag_run"]
    run_id = run["dag_run_id"] if isinstance(run, dict) else run.run_id
    with open(os.environ["TOLD"], "a") as told:
        print(json.dumps([what, run_id]), file=told)


def succeeded(context):
    _tell("succeeded", context)


def failed(context):
    _tell("failed", context)


def late(context):
    _tell("late", context)
"""
TRAINING = """
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Asset

with DAG("training", schedule=[Asset("file://{published}/acme--tiny-deepseek-v3")]):
    EmptyOperator(task_id="train")
"""

pytestmark = pytest.mark.timeout(1800)  # of a machine that has other work; alone it takes half a minute


@pytest.fixture(scope="module")
def on_postgresql(tmp_path_factory, standalone_hub, installed, installed_bundle):
    if programs() is None and not os.environ.get("CI"):
        pytest.skip("PostgreSQL is not installed: the DAG was NOT tested on it")
    directory = tmp_path_factory.mktemp("on-postgresql")
    (directory / "own" / "dags").mkdir(parents=True)
    (directory / "own" / "of_ones_own.py").write_text(OF_ONES_OWN)
    (directory / "own" / "dags" / "training.py").write_text(TRAINING.format(published=directory / "published"))
    ferry_bundle = json.loads(installed_bundle[BUNDLES])[0]
    bundles = [ferry_bundle, {**ferry_bundle, "name": "own", "kwargs": {"path": str(directory / "own" / "dags")}}]
    with running_postgresql() as address:
        environment = {
            BUNDLES: json.dumps(bundles),
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": address,
            "FERRY_DEADLINE_HOURS": "0.001",
            "FERRY_ON_DEADLINE": "of_ones_own:late",
            "FERRY_ON_FAILURE": "of_ones_own:failed",
            "FERRY_ON_SUCCESS": "of_ones_own:succeeded",
            "PYTHONPATH": f"{installed}:{directory / 'own'}",
            "TOLD": str(directory / "told"),
        }
        with running_standalone(directory, standalone_hub, **environment) as server:
            yield server


def told(server, run_id):
    """Waits until two things are told of a run: that it is late, and how it ended."""
    path = server.directory / "told"

    def both():
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = [what for what, of in lines if of == run_id]
        return found if len(found) >= 2 else None

    return server.wait_until(both, 120, f"word of {run_id}")


@pytest.fixture(scope="module")
def onboarded(on_postgresql):
    run_id = on_postgresql.trigger(DAG, {"repo": REPO, "dequantize": "fused"})
    assert on_postgresql.wait_for_run(DAG, run_id) == "success"
    return run_id


def test_onboarding(on_postgresql, onboarded):
    published = on_postgresql.xcom(DAG, onboarded, "publish")
    assert published["verdict"] == "pass"
    assert (on_postgresql.directory / "published" / "acme--tiny-deepseek-v3" / published["commit"]).is_dir()
    assert not (on_postgresql.home / "airflow.db").exists()


def test_training_that_is_scheduled_on_the_model_begins(on_postgresql, onboarded):
    """A DAG of one's own, which names the model's asset; it is told what was published."""

    def begun():
        return on_postgresql.api("GET", "/dags/training/dagRuns")["dag_runs"]

    (run,) = on_postgresql.wait_until(begun, 60, "run of training")
    path = f"/dags/training/dagRuns/{quote(run['dag_run_id'])}/upstreamAssetEvents"
    (event,) = on_postgresql.api("GET", path)["asset_events"]
    published = on_postgresql.xcom(DAG, onboarded, "publish")
    told_of = {key: published[key] for key in ("url", "commit", "verdict", "digest")}
    assert event["extra"].items() >= told_of.items()


def test_late_run_that_succeeds_is_told_of_once(on_postgresql, onboarded):
    assert told(on_postgresql, onboarded) == ["late", "succeeded"]


def test_run_that_fails_is_told_of(on_postgresql):
    run_id = on_postgresql.trigger(DAG, {"repo": "acme/none"})
    assert on_postgresql.wait_for_run(DAG, run_id) == "failed"
    assert sorted(told(on_postgresql, run_id)) == ["failed", "late"]
