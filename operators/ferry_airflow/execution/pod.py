"""The pod that a command runs in: its settings and its specification."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from conversion_lib.storage.lease import HOLDER_VARIABLE
from ferry_airflow.execution.base import StageCommand, TaskIdentity
from ferry_airflow.execution.in_pod import MESSAGE_PATH
from ferry_airflow.layout import WORK_DIR_VARIABLE

CONTAINER = "ferry"
SCRATCH = "/scratch"
USER = 1000
"""The id of the image's user. Files in the volumes get its group."""

Json = dict[str, Any]


class SecretKey(BaseModel):
    """A key of a Kubernetes Secret."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    key: str


class Scratch(BaseModel):
    """The ephemeral volume of a pod, for temporary files. It is created and removed with the pod."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = "20Gi"
    storage_class: str | None = None


class PodSettings(BaseModel):
    """Settings of the execution mode `kubernetes` in the file that FERRY_EXECUTION names.

    Quantities are in Kubernetes' notation: `8Gi`, `500m`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    connection: str | None = None
    """An Airflow connection of the type kubernetes. None: the cluster that Airflow itself runs in."""
    namespace: str = "default"
    work_claim: str
    """A PersistentVolumeClaim that many pods can mount at once. The stages of a run share files in it."""
    work_dir: str = "/work"
    """Where the claim is mounted; also the command's FERRY_WORK_DIR."""
    scratch: Scratch = Scratch()
    cpu: str = "2"
    memory: str = "4Gi"
    """Requested. Memory is also the limit."""
    node_selector: dict[str, str] = {}
    tolerations: list[Json] = []
    service_account: str | None = None
    image_pull_secrets: list[str] = []
    environment: dict[str, str] = {}
    secrets: dict[str, SecretKey] = {}
    """Environment variables from existing Secrets, such as HF_TOKEN."""
    startup_seconds: int = Field(1800, gt=0)
    """How long a pod may wait for a node and the image before the task is retried."""
    poll_seconds: float = Field(10.0, gt=0)
    """How often the pod's state is read."""
    log_seconds: int = Field(30, gt=0)
    """How often new log lines are fetched while the pod runs."""
    stages: dict[str, Json] = {}
    """Settings of single stages, by stage. They replace those above."""

    def of_stage(self, stage: str) -> PodSettings:
        """Returns the settings of a stage: its own replace the common ones.

        Raises:
            ValidationError: The stage's own settings are wrong.
        """
        own = self.model_dump(exclude_unset=True, exclude={"stages"})
        return PodSettings.model_validate({**own, **self.stages.get(stage, {})})


def labels(task: TaskIdentity) -> dict[str, str]:
    """Returns the labels by which a task's pod is found again."""
    from airflow.providers.cncf.kubernetes.pod_generator import make_safe_label_value

    found = {"dag_id": task.dag_id, "run_id": task.run_id, "task_id": task.task_id, "map_index": str(task.map_index)}
    values = {f"ferry/{key}": make_safe_label_value(value) for key, value in found.items() if key != "map_index"}
    # a label's value must begin with a letter or a digit
    return {"app.kubernetes.io/name": "ferry", **values, "ferry/map_index": f"i{task.map_index}".replace("-", "")}


def selector(task: TaskIdentity) -> str:
    """Returns `labels` as a label selector of the API."""
    return ",".join(f"{key}={value}" for key, value in labels(task).items())


def specification(settings: PodSettings, command: StageCommand, secrets: Iterable[str], task: TaskIdentity) -> Json:
    """Returns the specification of a pod for a command.

    Args:
        settings: The settings of the stage, as `of_stage` returns them.
        command: What the pod runs.
        secrets: Names of environment variables whose values are in a Secret with the pod's name (`secret_for`).
        task: The task that the pod's labels name.
    """
    name = f"ferry-{command.arguments[0]}-{uuid.uuid4().hex[:10]}"
    arguments = ["-m", "ferry_airflow.execution.in_pod", command.module, *command.arguments]
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    resources = {"cpu": settings.cpu, "memory": settings.memory}
    container = {
        "name": CONTAINER,
        "image": settings.image,
        "command": ["python"],
        "args": arguments,
        "env": _environment(settings, name, secrets, task),
        # the limit is the request: a conversion keeps to its memory budget
        "resources": {"requests": resources, "limits": {"memory": settings.memory}},
        "securityContext": security,
        "terminationMessagePath": MESSAGE_PATH,
        "volumeMounts": [
            {"name": "work", "mountPath": settings.work_dir},
            {"name": "scratch", "mountPath": SCRATCH},
        ],
    }
    spec = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": _volumes(settings),
        "nodeSelector": settings.node_selector,
        "tolerations": settings.tolerations,
        "imagePullSecrets": [{"name": secret} for secret in settings.image_pull_secrets],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # after SIGTERM, time to record what is finished
        "terminationGracePeriodSeconds": 60,
        **({"serviceAccountName": settings.service_account} if settings.service_account else {}),
    }
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    metadata = {"name": name, "namespace": settings.namespace, "labels": labels(task), "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def secret_for(pod: Mapping[str, Any], secrets: Mapping[str, str]) -> Json:
    """Returns the Secret with the variables of one pod. The pod owns it, so Kubernetes removes it with the pod.

    Args:
        pod: The pod's `name`, `namespace` and `uid`.
        secrets: The variables' values, by name.
    """
    owner = {"apiVersion": "v1", "kind": "Pod", "name": pod["name"], "uid": pod["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {"name": pod["name"], "namespace": pod["namespace"], "ownerReferences": [owner]},
        "stringData": dict(secrets),
    }


def _environment(settings: PodSettings, name: str, secrets: Iterable[str], task: TaskIdentity) -> list[Json]:
    plain = {
        **settings.environment,
        WORK_DIR_VARIABLE: settings.work_dir,
        "HOME": SCRATCH,
        "TMPDIR": SCRATCH,
        "PYTHONUNBUFFERED": "1",
        HOLDER_VARIABLE: str(task),
    }
    keys = {**{variable: SecretKey(name=name, key=variable) for variable in secrets}, **settings.secrets}
    return [
        *({"name": variable, "value": value} for variable, value in plain.items()),
        *({"name": variable, "valueFrom": {"secretKeyRef": key.model_dump()}} for variable, key in keys.items()),
    ]


def _volumes(settings: PodSettings) -> list[Json]:
    claim: Json = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": settings.scratch.size}},
    }
    if settings.scratch.storage_class:
        claim["storageClassName"] = settings.scratch.storage_class
    return [
        {"name": "work", "persistentVolumeClaim": {"claimName": settings.work_claim}},
        {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": claim}}},
    ]
