"""Stages in pods, in a real Airflow with its scheduler and triggerer: the pods run as processes of this machine."""

import json
import signal
from types import SimpleNamespace

import pytest
import yaml

from conversion_lib.demo.hub_repository import index_repo
from tests.dags.test_in_airflow import DAG, converting, larger  # noqa: F401 - a fixture
from tests.support.airflow.standalone import TOKEN
from tests.support.fakes.kubernetes import FakeCluster, Kubelet

REPO = "acme/larger"

pytestmark = pytest.mark.timeout(1200)  # of a machine that has other work


@pytest.fixture(scope="module")
def pods(standalone, standalone_hub, larger, tmp_path_factory):  # noqa: F811
    """A cluster where downloads and conversions run, and the repository that wants the token."""
    standalone_hub.repos[REPO] = index_repo(REPO, larger)
    standalone_hub.faults.gated[REPO] = TOKEN
    with FakeCluster() as cluster, Kubelet(cluster, tmp_path_factory.mktemp("node")) as kubelet:
        connection = {"connection_id": "cluster", **json.loads(cluster.connection())}
        standalone.api("POST", "/connections", connection)
        settings = {
            "image": "registry.example/ferry:1",
            "connection": "cluster",
            "work_claim": "ferry-work",
            "work_dir": standalone.environment["FERRY_WORK_DIR"],
            "environment": {"HF_ENDPOINT": standalone_hub.endpoint},
            "poll_seconds": 0.5,
            "log_seconds": 1,
        }
        path = standalone.directory / "execution.yaml"
        before = path.read_text()
        modes = {**yaml.safe_load(before), "stages": {"download": "kubernetes", "convert": "kubernetes"}}
        path.write_text(yaml.safe_dump({**modes, "kubernetes": settings}))
        yield SimpleNamespace(cluster=cluster, kubelet=kubelet, work=standalone.directory / "work" / "acme--larger")
        path.write_text(before)


def stage_of(pod):
    return pod["metadata"]["labels"]["ferry/task_id"]


def converting_pod(pods, but):
    """The name of the pod whose conversion has journaled something."""
    names = [name for name, pod in pods.cluster.pods.items() if stage_of(pod) == "convert" and name != but]
    return names[0] if names and converting(pods.work) else None


def stopped_pod(standalone, pods, but=None):
    """The pod of a conversion, stopped in the middle."""
    name = standalone.wait_until(lambda: converting_pod(pods, but), 900, "journal of the conversion", every=0.05)
    pods.kubelet.signal(name, signal.SIGSTOP)
    return name


def conf(standalone, **more):
    return {"repo": REPO, "destination": str(standalone.directory / "never"), **more}


@pytest.fixture(scope="module")
def evicted(standalone, pods):
    """A run whose conversion was evicted in the middle; during its second try Airflow itself is killed and begun anew.

    The run is ended once the conversion has gone on and come to its end.
    """
    run_id = standalone.trigger(DAG, conf(standalone), dag_run_id="evicted")
    first = stopped_pod(standalone, pods)
    pods.kubelet.evict(first)
    second = stopped_pod(standalone, pods, but=first)  # it is still at work when Airflow is back
    standalone.wait_until(lambda: standalone.tasks(DAG, run_id)["convert[0]"]["state"] == "deferred", 60, "deferral")
    standalone.restart("triggerer", AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD="15")
    standalone.restart("scheduler")
    pods.kubelet.signal(second, signal.SIGCONT)

    def converted():
        task = standalone.tasks(DAG, run_id).get("convert[0]") or {"state": None}
        assert task["state"] != "failed", standalone.task_log(DAG, run_id, "convert", try_number=2)
        return task["state"] == "success"

    standalone.wait_until(converted, 900, "second try")
    standalone.api("PATCH", f"/dags/{DAG}/dagRuns/{run_id}", {"state": "failed"})  # the rest has its own tests
    return run_id


def test_evicted_conversion_resumes_in_a_pod_that_airflow_finds_again(standalone, pods, evicted):
    stages = [stage_of(pod) for pod in pods.cluster.made if pod["metadata"]["labels"]["ferry/run_id"] == "evicted"]
    assert stages == ["download", "convert", "convert"]  # Airflow found the second again: there is no third
    assert standalone.tasks(DAG, evicted)["convert[0]"]["try_number"] == 2
    first, second = (standalone.task_log(DAG, evicted, "convert", try_number=number) for number in (1, 2))
    assert "Evicted: The node was low on memory" in first
    manifest = standalone.xcom(DAG, evicted, "convert", map_index=0)
    assert manifest["pieces_skipped"] >= 1
    assert f"Resumed: {manifest['pieces_skipped']} of " in second
    assert pods.cluster.pods == {}


def test_token_goes_by_a_secret_alone(standalone, pods, evicted):
    assert TOKEN not in json.dumps(pods.cluster.made)
    assert {"HF_TOKEN"} == {
        variable["name"]
        for pod in pods.cluster.made
        for variable in pod["spec"]["containers"][0]["env"]
        if "valueFrom" in variable
    }
    assert pods.cluster.secrets == {}  # they went with their pods
    looked_at = [path for path in standalone.directory.rglob("*") if path.is_file()]
    assert [path for path in looked_at if TOKEN.encode() in path.read_bytes()] == []


def test_task_that_is_marked_failed_has_its_pod_deleted(standalone, pods, evicted):
    """While it is deferred, with no process of its own: Airflow's triggerer does it."""
    run_id = standalone.trigger(DAG, conf(standalone, scan_layers=False), dag_run_id="marked-in-pods")
    name = stopped_pod(standalone, pods)
    process = pods.kubelet.processes[name]
    standalone.api("PATCH", f"/dags/{DAG}/dagRuns/{run_id}/taskInstances/convert/0", {"new_state": "failed"})
    standalone.wait_until(lambda: name not in pods.cluster.pods, 60, "end of the pod")
    pods.kubelet.signal(name, signal.SIGCONT)
    assert process.wait(60) == 143  # ferry heard SIGTERM and kept its journal
    assert standalone.wait_for_run(DAG, run_id) == "failed"
