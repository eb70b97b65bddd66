"""The pod that a command runs in: what is configured of it, and its specification."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ferry_airflow.execution.base import StageCommand, TaskIdentity
from ferry_airflow.execution.in_pod import MESSAGE_PATH
from ferry_airflow.layout import WORK_DIR_VARIABLE

CONTAINER = "ferry"
SCRATCH = "/scratch"
USER = 1000
"""The image's user; files in the volumes get its group."""

Json = dict[str, Any]


class SecretKey(BaseModel):
    """A key of a Kubernetes Secret."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    key: str


class Scratch(BaseModel):
    """The ephemeral volume of a pod, for temporary files: it is made and removed with the pod."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = "20Gi"
    storage_class: str | None = None


class PodSettings(BaseModel):
    """Settings of the execution mode `kubernetes` in the file that FERRY_EXECUTION names.

    `stages` replaces them stage by stage. Quantities are Kubernetes' own: `8Gi`, `500m`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    connection: str | None = None
    """An Airflow connection of the type kubernetes; none: the cluster that Airflow itself runs in."""
    namespace: str = "default"
    work_claim: str
    """A PersistentVolumeClaim that many pods may mount at once: where the stages of a run find each other's files."""
    work_dir: str = "/work"
    """Where it is mounted; FERRY_WORK_DIR of the command."""
    scratch: Scratch = Scratch()
    cpu: str = "2"
    memory: str = "4Gi"
    node_selector: dict[str, str] = {}
    tolerations: list[Json] = []
    service_account: str | None = None
    image_pull_secrets: list[str] = []
    environment: dict[str, str] = {}
    secrets: dict[str, SecretKey] = {}
    """Environment variables from Secrets that are there, such as HF_TOKEN."""
    startup_seconds: int = Field(1800, gt=0)
    """How long a pod may wait for its node and its image before the task is tried again."""
    poll_seconds: float = Field(10.0, gt=0)
    log_seconds: int = Field(30, gt=0)
    """How often the task's log gets the pod's new lines while it runs."""
    stages: dict[str, Json] = {}

    def of_stage(self, stage: str) -> PodSettings:
        """With the stage's own settings instead of those of all. Raises ValidationError."""
        own = self.model_dump(exclude_unset=True, exclude={"stages"})
        return PodSettings.model_validate({**own, **self.stages.get(stage, {})})


def labels(task: TaskIdentity) -> dict[str, str]:
    """By these a task's pod is found again."""
    from airflow.providers.cncf.kubernetes.pod_generator import make_safe_label_value

    found = {"dag_id": task.dag_id, "run_id": task.run_id, "task_id": task.task_id, "map_index": str(task.map_index)}
    values = {f"ferry/{key}": make_safe_label_value(value) for key, value in found.items() if key != "map_index"}
    # a label's value begins with a letter or a digit
    return {"app.kubernetes.io/name": "ferry", **values, "ferry/map_index": f"i{task.map_index}".replace("-", "")}


def selector(task: TaskIdentity) -> str:
    """`labels` as the API takes them."""
    return ",".join(f"{key}={value}" for key, value in labels(task).items())


def specification(settings: PodSettings, command: StageCommand, secrets: Iterable[str], task: TaskIdentity) -> Json:
    """The pod for a command; `secrets` are names of variables in a Secret that has the pod's own name."""
    name = f"ferry-{command.arguments[0]}-{uuid.uuid4().hex[:10]}"
    arguments = ["-m", "ferry_airflow.execution.in_pod", command.module, *command.arguments]
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    resources = {"cpu": settings.cpu, "memory": settings.memory}
    container = {
        "name": CONTAINER,
        "image": settings.image,
        "command": ["python"],
        "args": arguments,
        "env": _environment(settings, name, secrets),
        # what is asked for is what may be taken: a conversion holds a budget
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
        # SIGTERM, then time enough to write down what is finished
        "terminationGracePeriodSeconds": 60,
        **({"serviceAccountName": settings.service_account} if settings.service_account else {}),
    }
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    metadata = {"name": name, "namespace": settings.namespace, "labels": labels(task), "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def secret_for(pod: Mapping[str, Any], secrets: Mapping[str, str]) -> Json:
    """The Secret with the variables of one pod: it belongs to the pod, and Kubernetes removes it with the pod."""
    owner = {"apiVersion": "v1", "kind": "Pod", "name": pod["name"], "uid": pod["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {"name": pod["name"], "namespace": pod["namespace"], "ownerReferences": [owner]},
        "stringData": dict(secrets),
    }


def _environment(settings: PodSettings, name: str, secrets: Iterable[str]) -> list[Json]:
    plain = {
        **settings.environment,
        WORK_DIR_VARIABLE: settings.work_dir,
        "HOME": SCRATCH,
        "TMPDIR": SCRATCH,
        "PYTHONUNBUFFERED": "1",
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
