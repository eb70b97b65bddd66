"""The execution mode `kubernetes`: the real clients and Airflow's real trigger, against a small API server here."""

import asyncio
import json
import threading
import time

import kubernetes_validate
import pytest
import yaml
from airflow.sdk.exceptions import TaskDeferred

from conversion_lib.errors import BadInput, CheckFailed, OutsideFailure, Terminated
from ferry_airflow.download import DownloadOperator
from ferry_airflow.execution import configured
from ferry_airflow.execution.base import StageCommand, StageFailed, TaskIdentity
from ferry_airflow.execution.in_pod import MESSAGE_BYTES, message
from ferry_airflow.execution.pod import PodSettings, specification
from tests.ferry_airflow.conftest import TASK, ferry
from tests.support.fakes.kubernetes import FakeCluster, Kubelet

TOKEN = "hf_mustNotBeSeen"
BIG = {"memory": "64Gi", "cpu": "16", "node_selector": {"pool": "big"}}
SETTINGS = {
    "image": "registry.example/ferry:1",
    "connection": "cluster",
    "namespace": "ferry",
    "work_claim": "ferry-work",
    "poll_seconds": 0.05,
    "log_seconds": 1,
    "scratch": {"size": "50Gi", "storage_class": "fast"},
    "service_account": "ferry",
    "image_pull_secrets": ["registry"],
    "environment": {"HF_ENDPOINT": "http://hub"},
    "tolerations": [{"key": "big", "operator": "Exists", "effect": "NoSchedule"}],
    "stages": {"convert": BIG},
}


@pytest.fixture
def cluster(monkeypatch):
    cluster = FakeCluster()
    monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", cluster.connection())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield cluster
    cluster.close()


@pytest.fixture
def execution_file(tmp_path, monkeypatch):
    """The configuration, as an administrator writes it."""

    def write(**changed):
        path = tmp_path / "execution.yaml"
        path.write_text(yaml.safe_dump({"default": "kubernetes", "kubernetes": {**SETTINGS, **changed}}))
        monkeypatch.setenv("FERRY_EXECUTION", str(path))

    write()
    return write


@pytest.fixture
def mode(cluster, execution_file):
    return configured("download").mode


def started(mode, log, command=ferry("download", "a/b", "/files/x"), secrets=None, task=TASK):
    """Runs a command up to where the task defers; the trigger that it waits with."""
    with pytest.raises(TaskDeferred) as deferred:
        mode.run(command, secrets or {}, task, log)
    assert deferred.value.method_name == "resume"
    return deferred.value.trigger


def event_of(trigger):
    """What the trigger, made anew as another process does it, says when it fires."""
    path, kwargs = trigger.serialize()
    assert path.endswith("KubernetesPodTrigger")

    async def first():
        async for event in type(trigger)(**kwargs).run():
            return event.payload

    return asyncio.run(asyncio.wait_for(first(), 20))


def resumed(mode, trigger, log, command=ferry("download", "a/b", "/files/x")):
    return mode.resume(command, {}, event_of(trigger), log)


class TestSpecification:
    @pytest.fixture
    def pod(self):
        settings = PodSettings.model_validate(SETTINGS).of_stage("convert")
        return specification(settings, ferry("convert", "/a", "/b"), ["HF_TOKEN"], TASK)

    def test_is_valid(self, pod):
        kubernetes_validate.validate(pod, "1.31", strict=True)

    def test_resources_and_node_are_the_stages_own(self, pod):
        container = pod["spec"]["containers"][0]
        assert container["resources"]["requests"] == {"cpu": "16", "memory": "64Gi"}
        assert pod["spec"]["nodeSelector"] == {"pool": "big"}
        assert pod["spec"]["tolerations"] == SETTINGS["tolerations"]
        assert container["args"][-3:] == ["convert", "/a", "/b"]

    def test_volumes(self, pod):
        work, scratch = pod["spec"]["volumes"]
        assert work["persistentVolumeClaim"] == {"claimName": "ferry-work"}
        claim = scratch["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert (claim["resources"]["requests"]["storage"], claim["storageClassName"]) == ("50Gi", "fast")

    def test_secrets_are_references(self, pod):
        environment = {item["name"]: item for item in pod["spec"]["containers"][0]["env"]}
        reference = {"name": pod["metadata"]["name"], "key": "HF_TOKEN"}
        assert environment["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}
        assert environment["FERRY_WORK_DIR"]["value"] == "/work"

    @pytest.mark.parametrize("run_id", ["manual__2026-11-21T15:58:26.005825+00:00", "x" * 300])
    def test_labels_of_any_run(self, run_id):
        settings = PodSettings.model_validate(SETTINGS)
        pod = specification(settings, ferry("x"), [], TaskIdentity("dag", run_id, "t", 3))
        kubernetes_validate.validate(pod, "1.31", strict=True)
        assert all(len(value) <= 63 for value in pod["metadata"]["labels"].values())


class TestLife:
    def test_result_log_and_end(self, cluster, mode, log):
        trigger = started(mode, log)
        cluster.run()
        cluster.write("one of two", "two of two")
        cluster.end(message=json.dumps({"path": "/files/x", "seconds": 1.5}))
        assert resumed(mode, trigger, log) == {"path": "/files/x", "seconds": 1.5}
        assert [line for _, line in log.lines[1:]] == ["one of two", "two of two"]
        assert cluster.pods == {}

    def test_lines_come_while_it_runs_and_none_twice(self, cluster, execution_file, log, capfd):
        execution_file(log_seconds=1)
        mode = configured("download").mode
        trigger = started(mode, log)
        cluster.run()
        cluster.write("one", seconds_ago=5)

        def end_when_the_trigger_has_looked():
            while not any("/log?" in path for _, path in cluster.requests):
                time.sleep(0.01)
            cluster.write("two")
            cluster.end(message="{}")

        threading.Thread(target=end_when_the_trigger_has_looked).start()
        event = event_of(trigger)
        mode.resume(ferry("download"), {}, event, log)
        assert "] one" in capfd.readouterr().out  # by the trigger
        assert [line for _, line in log.lines[1:]] == ["two"]

    @pytest.mark.parametrize(
        ("code", "kind"),
        [(1, CheckFailed), (2, BadInput), (3, OutsideFailure), (143, Terminated), (137, OutsideFailure)],
    )
    def test_failures(self, cluster, mode, log, code, kind):
        trigger = started(mode, log)
        cluster.run()
        cluster.write("ferry: model.safetensors: no such tensor")
        cluster.end(code, json.dumps({"max_kl": 0.5}))
        with pytest.raises(StageFailed, match=r"^ferry: model\.safetensors: no such tensor$") as caught:
            resumed(mode, trigger, log)
        assert (caught.value.exit_code, caught.value.meaning, caught.value.result) == (code, kind, {"max_kl": 0.5})
        assert log.lines[-1] == ("error", "ferry: model.safetensors: no such tensor")
        assert cluster.pods == {}

    def test_out_of_memory(self, cluster, mode, log):
        trigger = started(mode, log)
        cluster.run()
        cluster.end(1, reason="OOMKilled")
        with pytest.raises(StageFailed, match=r"exit code 1 \(OOMKilled\)") as caught:
            resumed(mode, trigger, log)
        assert caught.value.meaning is OutsideFailure

    def test_evicted(self, cluster, mode, log):
        trigger = started(mode, log)
        cluster.evict()
        with pytest.raises(OutsideFailure, match="Evicted: The node was low on memory"):
            resumed(mode, trigger, log)
        assert cluster.pods == {}

    def test_gone(self, cluster, mode, log):
        trigger = started(mode, log)
        cluster.delete(cluster.pod["metadata"]["name"])
        with pytest.raises(OutsideFailure, match="is gone"):
            resumed(mode, trigger, log)

    def test_no_node_for_it(self, cluster, execution_file, log):
        execution_file(startup_seconds=1)
        mode = configured("download").mode
        with pytest.raises(OutsideFailure, match=r"deleted pod .* before it ended"):
            resumed(mode, started(mode, log), log)
        assert cluster.pods == {}


class TestReattached:
    def test_to_a_pod_at_work(self, cluster, mode, execution_file, log):
        """A worker that died before its task was deferred, a scheduler that began it anew: one pod, no second."""
        started(mode, log)
        cluster.run()
        name = cluster.pod["metadata"]["name"]
        again = configured("download").mode
        trigger = started(again, log)
        assert log.lines[-1][1].startswith("Attached to: ") and name in log.lines[-1][1]
        cluster.end(message="{}")
        assert resumed(again, trigger, log) == {}
        assert len([path for method, path in cluster.requests if method == "POST" and path.endswith("/pods")]) == 1

    def test_not_to_another_tasks(self, cluster, mode, log):
        started(mode, log)
        for other in (TaskIdentity("dag", "manual__1", "t", 0), TaskIdentity("dag", "manual__2", "t", -1)):
            started(configured("download").mode, log, task=other)
        assert len(cluster.pods) == 3

    def test_not_to_one_that_failed(self, cluster, mode, log):
        started(mode, log)
        failed = cluster.pod["metadata"]["name"]
        cluster.evict()
        started(configured("download").mode, log)
        assert cluster.pod["metadata"]["name"] != failed


class TestKilled:
    def test_while_the_task_runs(self, cluster, mode, log):
        started(mode, log)
        mode.kill()
        assert cluster.pods == {}
        mode.kill()  # of one that is gone

    def test_while_the_task_is_deferred(self, cluster, mode, log):
        """Somebody marks the task failed: Airflow tells the trigger."""
        trigger = started(mode, log)
        asyncio.run(trigger.on_kill())
        assert cluster.pods == {}


class TestSecrets:
    def test_of_a_connection_go_by_a_secret_that_ends_with_the_pod(self, cluster, mode, log):
        trigger = started(mode, log, secrets={"HF_TOKEN": TOKEN})
        pod = cluster.pod
        assert TOKEN not in json.dumps(pod) + str(log.lines) + str(trigger.serialize())
        (secret,) = cluster.secrets.values()
        assert secret["stringData"] == {"HF_TOKEN": TOKEN}
        assert secret["metadata"]["ownerReferences"][0]["uid"] == pod["metadata"]["uid"]
        cluster.run()
        cluster.end(message="{}")
        resumed(mode, trigger, log)
        assert cluster.secrets == {}

    def test_of_the_cluster_take_precedence(self, cluster, execution_file, log):
        execution_file(secrets={"HF_TOKEN": {"name": "hub", "key": "token"}})
        started(configured("download").mode, log, secrets={"HF_TOKEN": TOKEN})
        environment = {item["name"]: item for item in cluster.pod["spec"]["containers"][0]["env"]}
        assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}


class TestApi:
    def test_an_outage_may_pass(self, cluster, mode, log):
        cluster.down = True
        with pytest.raises(OutsideFailure, match="answers 503"):
            mode.run(ferry("download"), {}, TASK, log)

    def test_a_missing_right_will_not(self, cluster, mode, log):
        cluster.forbidden = {"POST pods"}
        with pytest.raises(BadInput, match="answers 403 pods is forbidden"):
            mode.run(ferry("download"), {}, TASK, log)

    def test_no_pod_is_left_waiting_for_a_secret_that_may_not_be_made(self, cluster, mode, log):
        cluster.forbidden = {"POST secrets"}
        with pytest.raises(BadInput, match="answers 403"):
            mode.run(ferry("download"), {"HF_TOKEN": TOKEN}, TASK, log)
        assert cluster.pods == {}

    def test_nobody_there(self, cluster, mode, log):
        cluster.close()
        with pytest.raises(OutsideFailure, match="cannot be reached"):
            mode.run(ferry("download"), {}, TASK, log)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"image": None}, "image: input should be a valid string"),
            ({"memory_limit": "4Gi"}, "memory_limit: extra inputs"),
            ({"stages": {"download": {"startup_seconds": 0}}}, "startup_seconds: input should be greater"),
        ],
        ids=["missing", "unknown", "stage"],
    )
    def test_wrong_options_are_refused_by_name(self, execution_file, wrong, says):
        execution_file(**wrong)
        with pytest.raises(BadInput, match=f"execution.yaml: kubernetes: {says}"):
            configured("download")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("default: mars", "cannot be loaded"),
            ("default: [", r"execution\.yaml, line 1: "),
            ("default: 1", "default"),
        ],
    )
    def test_wrong_files(self, tmp_path, monkeypatch, text, says):
        (tmp_path / "execution.yaml").write_text(text)
        monkeypatch.setenv("FERRY_EXECUTION", str(tmp_path / "execution.yaml"))
        with pytest.raises(BadInput, match=says):
            configured("download")

    def test_no_file_is_local(self, monkeypatch):
        monkeypatch.delenv("FERRY_EXECUTION", raising=False)
        assert type(configured("download").mode).__name__ == "LocalSubprocess"

    def test_options_of_a_stage(self, cluster, tmp_path, monkeypatch, context):
        text = {"default": "kubernetes", "options": {"download": ["--quiet"]}, "kubernetes": SETTINGS}
        (tmp_path / "execution.yaml").write_text(yaml.safe_dump(text))
        monkeypatch.setenv("FERRY_EXECUTION", str(tmp_path / "execution.yaml"))
        source = {"repo": "a/b", "commit": "c", "path": "/w"}
        with pytest.raises(TaskDeferred):
            DownloadOperator(task_id="t", source=source).execute(context)
        assert cluster.pod["spec"]["containers"][0]["args"][-2:] == ["c", "--quiet"]


def test_results_are_kept_small():
    layers = [{"name": "x" * 50}] * 500
    result = {"verdict": "pass", "layers": layers, "plan": {"bytes": 1, "arrays": layers}, "long": "y" * 9000}
    text = message(json.dumps(result).encode())
    assert len(text) <= MESSAGE_BYTES
    assert json.loads(text) == {"verdict": "pass", "plan": {"bytes": 1}}
    assert message(b"no JSON") == ""


def test_operator_from_execute_to_manifest(cluster, execution_file, context, work_dir, tmp_path):
    """A stage in a pod whose command really runs: it refuses its input, in the words it has on this machine too."""
    source = {"repo": "acme/none", "commit": "c0ffee", "path": str(tmp_path / "hf"), "work_dir": str(tmp_path)}
    operator = DownloadOperator(task_id="t", source=source)
    with pytest.raises(TaskDeferred) as deferred:
        operator.execute(context)
    again = DownloadOperator(task_id="t", source=source)  # Airflow makes it anew
    with Kubelet(cluster, tmp_path, HF_HUB_OFFLINE="1"), pytest.raises(BadInput, match="HF_HUB_OFFLINE is set"):
        again.resume(context, event_of(deferred.value.trigger))
    saved = json.loads((work_dir / "runs" / "dag@manual__1" / "t.json").read_text())
    assert (saved["exit_code"], saved["error"][:7]) == (2, "ferry: ")


def test_a_command_of_the_steps(cluster, mode, log):
    started(mode, log, StageCommand(("clean-up", "/files/x"), StageCommand.STEPS))
    arguments = cluster.pod["spec"]["containers"][0]["args"]
    assert arguments == ["-m", "ferry_airflow.execution.in_pod", "ferry_airflow.steps", "clean-up", "/files/x"]
