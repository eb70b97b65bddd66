"""What lies in deploy/ is what Kubernetes and the operators take."""

import re

import kubernetes_validate
import pytest
import yaml

from ferry_airflow.execution import configured
from ferry_airflow.execution.kubernetes import KubernetesPod
from ferry_airflow.execution.pod import specification
from tests.ferry_airflow.conftest import TASK, ferry
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_kustomization_names_every_manifest():
    resources = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert sorted(resources) == [path.name for path in MANIFESTS]


@pytest.mark.parametrize("stage", ["resolve", "convert", "check", "publish"])
def test_execution_is_configured(stage, monkeypatch):
    monkeypatch.setenv("FERRY_EXECUTION", str(DEPLOY / "execution.yaml"))
    found = configured(stage)
    assert isinstance(found.mode, KubernetesPod)
    pod = specification(found.mode._settings, ferry(stage, *found.options), [], TASK)
    kubernetes_validate.validate(pod, "1.31", strict=True)
    assert bool(pod["spec"]["nodeSelector"]) == (stage in ("convert", "check"))


def test_pods_use_what_the_manifests_make():
    settings = yaml.safe_load((DEPLOY / "execution.yaml").read_text())["kubernetes"]
    made = {
        (document["kind"], document["metadata"]["name"])
        for path in MANIFESTS
        for document in yaml.safe_load_all(path.read_text())
    }
    assert ("PersistentVolumeClaim", settings["work_claim"]) in made
    assert ("ServiceAccount", settings["service_account"]) in made
    assert ("Namespace", settings["namespace"]) in made


def test_settings_name_only_what_the_image_has():
    """Its Dockerfile makes the link to the DAGs, and keeps nothing else in /opt/ferry."""
    lines = (DEPLOY / "airflow.env").read_text().splitlines()
    active = "\n".join(line for line in lines if not line.startswith("#"))
    assert set(re.findall(r"/opt/ferry[\w./-]*", active)) == {"/opt/ferry/dags"}
    dockerfile = (DEPLOY / "image" / "Dockerfile").read_text()
    assert "WORKDIR /opt/ferry\n" in dockerfile
    assert re.search(r"ln -s .* dags\n", dockerfile)
