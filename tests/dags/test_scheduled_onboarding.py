"""`scheduled_onboarding` in a real Airflow, against a Hub on this machine."""

import json
import subprocess
import sys
from datetime import datetime

import pytest

from conversion_lib.demo.local_hub import Fault
from tests.support.airflow.environment import airflow_environment
from tests.support.airflow.scheduled import DAG, ONBOARDING, run_scheduled
from tests.support.airflow.standalone import OTHER_REPO, REPO
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(1200)

SLUG = "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"


def states(server, run_id, task_id):
    """State of each instance of a task, by what it is labelled with."""
    tasks = [task for task in server.tasks(DAG, run_id).values() if task["task_id"] == task_id]
    return {task["rendered_map_index"] or task["map_index"]: task["state"] for task in tasks}


def test_new_model_is_onboarded(standalone, standalone_hub, scheduled):
    assert states(standalone, scheduled.run_id, "onboard") == {
        scheduled.onboarding: "success",
        scheduled.failed: "failed",
    }
    commit = standalone_hub.repos[REPO].commit
    published = standalone.directory / "published" / "acme--tiny-deepseek-v3" / commit / SLUG
    assert (published / "ferry_commit.json").exists()


def test_no_more_at_once_than_the_catalogue_says(standalone, scheduled):
    runs = [
        standalone.api("GET", f"/dags/{ONBOARDING}/dagRuns/{run_id}")
        for run_id in (scheduled.onboarding, scheduled.failed)
    ]
    first, second = sorted(runs, key=lambda run: run["start_date"])
    assert datetime.fromisoformat(second["start_date"]) >= datetime.fromisoformat(first["end_date"])


def test_wrong_ones_stop_no_other_and_are_told(standalone, scheduled):
    looked = [
        task["state"] for name, task in standalone.tasks(DAG, scheduled.run_id).items() if name.startswith("look")
    ]
    assert looked == ["success"] * 3
    log = standalone.task_log(DAG, scheduled.run_id, "summarize")
    assert "WRONG ENTRY: catalog.yaml, line 6: targets.0.scan_layers: 'no'" in log
    assert "acme/gone: no such repository" in log
    assert "its onboarding ended as failed and published nothing" in log


def test_summary_is_left_by_xcom_and_as_a_file(standalone, scheduled):
    rows = standalone.xcom(DAG, scheduled.run_id, "summarize", "rows")
    assert [(row["repo"], row["state"]) for row in rows] == [
        (REPO, "published"),
        ("acme/gone", "wrong"),
        (REPO, "failed"),
    ]
    assert rows[0]["verdict"] == "pass"
    assert rows[0]["bytes"] > 1e6
    files = (standalone.directory / "work" / "runs").glob("*/summary.json")
    summaries = [json.loads(path.read_text()) for path in files]
    (summary,) = [summary for summary in summaries if summary["problems"]]
    assert summary["models"] == rows


def test_next_run_finds_it_published_and_an_outage_skips_a_model(standalone, standalone_hub, scheduled):
    """A Hub that is away: the pinned model needs none and goes on, the other is skipped, with the reason."""
    standalone_hub.faults.planned.append(Fault("unavailable", "api", times=3))
    commit = standalone_hub.repos[REPO].commit
    catalog = "schedule: null\nat_most: 1\n"
    catalog += f"models: [{{repo: {REPO}, revision: {{commit: '{commit}'}}}}, {{repo: {OTHER_REPO}}}]\n"
    run_id = run_scheduled(standalone, catalog)
    assert states(standalone, run_id, "look") == {REPO: "success", OTHER_REPO: "skipped"}
    assert states(standalone, run_id, "onboard") in ({}, {-1: "skipped"})
    rows = {row["repo"]: row for row in standalone.xcom(DAG, run_id, "summarize", "rows")}
    assert rows[REPO]["state"] == "published"
    assert rows[OTHER_REPO]["state"] == "skipped"
    assert "HTTP 503" in rows[OTHER_REPO]["note"]


def run_python(home, program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**airflow_environment(home), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_dag_is_light_and_follows_its_catalogue(airflow_home, tmp_path):
    catalog = tmp_path / "other.yaml"
    catalog.write_text('schedule: "30 4 * * 1"\nat_most: 3\nmodels: []\n')
    program = (
        "import sys\n"
        "from dags.scheduled_onboarding import dag\n"
        "heavy = {'jax', 'torch', 'orbax', 'tensorstore', 'transformers', 'numpy', 'huggingface_hub', 'fastapi'}\n"
        "onboard = dag.get_task('onboard')\n"
        "print(sorted(heavy & set(sys.modules)), dag.schedule, onboard.max_active_tis_per_dag)"
    )
    done = run_python(airflow_home, program, FERRY_CATALOG=str(catalog))
    assert done.stdout.splitlines()[-1] == "[] 30 4 * * 1 3", done.stderr[-4000:]


def test_unreadable_catalogue_is_an_import_error_with_its_line(airflow_home, tmp_path):
    catalog = tmp_path / "broken.yaml"
    catalog.write_text("models: []\nschedule: at night\n")
    done = run_python(airflow_home, "import dags.scheduled_onboarding", FERRY_CATALOG=str(catalog))
    assert done.returncode != 0
    assert "broken.yaml, line 2: schedule: 'at night'" in done.stderr.splitlines()[-1]


def test_onboarding_takes_every_conf_that_an_entry_can_make(airflow_home):
    program = (
        "import copy\n"
        "from dags.onboard_checkpoint import PARAMS, dag\n"
        "from ferry_airflow.scheduling.catalog import Entry, Revision, TargetChoice\n"
        "full = Entry(repo='a/b', model_name='qwen3-0.6b', destination='/p', dequantize='fused', parts=2, max_kl=1,\n"
        "             approval=True)\n"
        "for entry in (full, Entry(repo='a/b', destination='/p')):\n"
        "    conf = entry.conf('0' * 40, TargetChoice(save_dtype='float32'))\n"
        "    params = copy.deepcopy(dag.params)\n"
        "    params.update(conf)\n"
        "    params.validate()\n"
        "    print(sorted(set(conf) - set(PARAMS)))"
    )
    done = run_python(airflow_home, program)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"], done.stderr[-4000:]
