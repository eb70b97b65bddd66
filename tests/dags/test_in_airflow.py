"""The DAGs in a real Airflow with all its parts: REST, approval, the asset, the token, conversions that are killed."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.airflow.standalone import DONE, REPO, TOKEN
from tests.support.checkpoints import QWEN3, incompressible_tensors, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors

DAG = "onboard_checkpoint"
LARGER = QWEN3 | {"head_dim": 64, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
LARGER |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2000}
SLUG = "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"

pytestmark = pytest.mark.timeout(1800)  # of a machine that has other work; alone it takes half a minute


@pytest.fixture(scope="module")
def approved(standalone):
    """A run in two parts that waited for a person, who approved."""
    destination = str(standalone.directory / "approved")
    conf = {"repo": REPO, "destination": destination, "parts": 2, "approval": True, "dequantize": "fused"}
    run_id = standalone.trigger(DAG, conf, dag_run_id="approved")
    standalone.wait_until(
        lambda: standalone.tasks(DAG, run_id)["approval"]["state"] == "awaiting_input", 900, "question to a person"
    )
    assert [path.name for path in (standalone.directory / "approved").iterdir()] == [".ferry-reports"]
    report = standalone.fetch("GET", f"/ferry/runs/{DAG}/{run_id}/report")
    assert (report[0], b"pass" in report[2]) == (200, True)
    path = f"/dags/{DAG}/dagRuns/{run_id}/taskInstances/approval/-1/hitlDetails"
    question = standalone.api("GET", path)
    standalone.wait_until(lambda: answered(standalone, run_id, path), 900, "end of the approved run")
    assert standalone.run_state(DAG, run_id) == "success", standalone.tasks(DAG, run_id)
    return run_id, question


def answered(standalone, run_id, path):
    """Approves at once, whenever it is asked: of an answer within a second the scheduler makes a try that died."""
    if standalone.tasks(DAG, run_id)["approval"]["state"] == "awaiting_input":
        standalone.request("PATCH", f"/api/v2{path}", {"chosen_options": ["Approve"], "params_input": {}})
    return standalone.run_state(DAG, run_id) in DONE


def test_a_person_is_told_the_verdict(approved):
    _, question = approved
    assert question["subject"] == f"Publish {REPO} for MaxText?"
    assert "| verdict | **pass** |" in question["body"]
    assert SLUG in question["body"]
    assert f"](/ferry/runs/{DAG}/approved/report)" in question["body"]


def test_parts_have_names_and_pools(standalone, approved):
    tasks = standalone.tasks(DAG, approved[0])
    assert {tasks[name]["rendered_map_index"] for name in ("convert[0]", "convert[1]")} == {"part 0/2", "part 1/2"}
    pools = {name: task["pool"] for name, task in tasks.items()}
    assert (pools["download"], pools["convert[0]"], pools["resolve"]) == ("hub_download", "high_memory", "default_pool")
    assert standalone.xcom(DAG, approved[0], "finalize")["parts"] == 2


def test_asset_of_the_model_is_updated(standalone, approved, standalone_hub):
    """What a training DAG is scheduled on."""
    published = standalone.xcom(DAG, approved[0], "publish")
    uri = f"file://{standalone.directory}/approved/acme--tiny-deepseek-v3"

    def events():
        found = standalone.api("GET", "/assets/events?limit=100")["asset_events"]
        return [event for event in found if event["uri"] == uri]

    (event,) = standalone.wait_until(events, 60, "event of the asset")
    assert (
        event["extra"].items()
        >= {
            "url": published["url"],
            "commit": standalone_hub.repos[REPO].commit,
            "target": SLUG,
            "verdict": "pass",
            "digest": published["digest"],
        }.items()
    )


def test_token_is_nowhere_to_be_seen(standalone, approved):
    """Not in logs, rendered templates, XCom, the database or anything that the runs wrote; the repository wanted it."""
    tasks = standalone.tasks(DAG, approved[0])
    assert tasks["resolve"]["rendered_fields"]["repo"] == REPO
    assert TOKEN not in json.dumps(tasks)
    looked_at = [path for path in standalone.directory.rglob("*") if path.is_file()]
    assert {"airflow.db", "standalone.log", "attempt=1.log", "manifest.json"} <= {path.name for path in looked_at}
    assert [path for path in looked_at if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"save_dtype": "float8_e4m3fn"}, "save_dtype"),
        ({"parts": 0}, "parts"),
        ({"repo": "no-slash"}, "repo"),
        ({"keep_files": "some"}, "keep_files"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_params_are_refused_by_rest(standalone, wrong, says):
    body = {"logical_date": None, "conf": {"repo": REPO, "destination": "/published", **wrong}}
    status, answer = standalone.request("POST", f"/api/v2/dags/{DAG}/dagRuns", body)
    assert status == 400
    assert f"Invalid input for param {says}" in answer["detail"]


def test_export_needs_a_destination(standalone):
    body = {"logical_date": None, "conf": {"checkpoint": "/c", "destination": "hf://nobody"}}
    status, answer = standalone.request("POST", "/api/v2/dags/export_checkpoint/dagRuns", body)
    assert (status, "destination" in answer["detail"]) == (400, True)


@pytest.fixture(scope="module")
def failed(standalone):
    """A run of an unknown repository, with the deadline that runs have by default."""
    run_id = standalone.trigger(DAG, {"repo": "acme/none", "destination": "/published"}, dag_run_id="failed")
    assert standalone.wait_for_run(DAG, run_id) == "failed"
    return run_id


TASK = {"dry_run": False, "task_ids": ["resolve"], "only_failed": False, "only_running": False}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("dagRuns/failed/clear", {"dry_run": False, "only_failed": True}),
        ("clearTaskInstances", {**TASK, "dag_run_id": "failed", "reset_dag_runs": True, "only_failed": True}),
        ("clearTaskInstances", {**TASK, "dag_run_id": "failed", "run_on_latest_version": True}),
    ],
    ids=["run", "task", "latest version"],
)
def test_failed_run_can_be_cleared(standalone, failed, path, body):
    tries = standalone.tasks(DAG, failed)["resolve"]["try_number"]
    status, answer = standalone.request("POST", f"/api/v2/dags/{DAG}/{path}", body)
    assert status == 200, answer
    standalone.wait_until(lambda: standalone.tasks(DAG, failed)["resolve"]["try_number"] > tries, 300, "another try")
    assert standalone.wait_for_run(DAG, failed) == "failed"


def test_running_run_can_be_cleared(standalone):
    run_id = standalone.trigger(DAG, {"repo": "acme/none", "destination": "/published"}, dag_run_id="cleared")
    body = {**TASK, "dag_run_id": run_id, "reset_dag_runs": True}
    status, answer = standalone.request("POST", f"/api/v2/dags/{DAG}/clearTaskInstances", body)
    assert status == 200, answer
    assert standalone.wait_for_run(DAG, run_id) == "failed"


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """180 MB that zstd cannot make smaller: with the memory budget of the fixture's Airflow, seconds of many groups."""
    path = tmp_path_factory.mktemp("model") / "larger"
    return write_checkpoint(path, LARGER, incompressible_tensors(llama_tensors(LARGER)))


def test_killed_conversion_resumes(standalone, larger):
    """The task's process is killed in the middle, as by a lack of memory; the second try goes on from the journal."""
    conf = {"repo": str(larger), "destination": str(standalone.directory / "never"), "keep_files": "remove"}
    run_id = standalone.trigger(DAG, conf, dag_run_id="killed")
    work = standalone.directory / "work" / "local"
    command, journal = stopped(standalone, work)
    groups = journal.read_text().count("\n")
    task_process = _parent(command)
    os.kill(task_process, signal.SIGKILL)
    try:
        convert = standalone.wait_until(lambda: _second_try(standalone, run_id), 900, "second try")
    finally:
        standalone.api("PATCH", f"/dags/{DAG}/dagRuns/{run_id}", {"state": "failed"})  # the rest has its own tests
    assert groups >= 1
    assert not _alive(command)
    manifest = standalone.xcom(DAG, run_id, "convert", map_index=0)
    assert convert["try_number"] == 2
    assert manifest["pieces_skipped"] >= 1
    second = standalone.task_log(DAG, run_id, "convert", try_number=2)
    assert f"Resumed: {manifest['pieces_skipped']} of " in second


def test_task_that_is_marked_failed_ends_its_command(standalone, larger):
    """By a person, in the middle: the command is told to end, keeps its journal, and is not tried again."""
    conf = {"repo": str(larger), "destination": str(standalone.directory / "never"), "scan_layers": False}
    run_id = standalone.trigger(DAG, conf, dag_run_id="marked")
    work = standalone.directory / "work" / "local"
    command, journal = stopped(standalone, work)
    standalone.api("PATCH", f"/dags/{DAG}/dagRuns/{run_id}/taskInstances/convert/0", {"new_state": "failed"})
    standalone.wait_until(lambda: _is_pending(command, signal.SIGTERM), 60, "SIGTERM", every=0.05)
    os.kill(command, signal.SIGCONT)
    standalone.wait_until(lambda: not _alive(command), 60, "end of the command")
    assert standalone.wait_for_run(DAG, run_id) == "failed"
    convert = standalone.tasks(DAG, run_id)["convert[0]"]
    assert (convert["state"], convert["try_number"]) == ("failed", 1)
    assert journal.stat().st_size > 0


def _second_try(standalone, run_id):
    task = standalone.tasks(DAG, run_id).get("convert[0]") or {"state": None}
    assert task["state"] != "failed", standalone.task_log(DAG, run_id, "convert", try_number=2)
    return task if task["state"] == "success" else None


def stopped(standalone, work):
    """Process number and journal of a conversion, stopped in the middle: it gets no further while we look."""
    found = standalone.wait_until(lambda: converting(work), 900, "journal of the conversion", every=0.05)
    os.kill(found[0], signal.SIGSTOP)
    return found


def converting(work):
    """Process number and journal of a conversion below `work` that has journaled something."""
    for journal in work.glob("*/*/.ferry/journal-*.jsonl"):
        if journal.stat().st_size == 0:
            continue
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "convert" in arguments and str(journal.parent.parent) in arguments:
                return int(process.name), journal
    return None


def _parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _is_pending(pid, number):
    """Whether a stopped process has been sent a signal."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["ShdPnd"], 16) >> number - 1 & 1)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
