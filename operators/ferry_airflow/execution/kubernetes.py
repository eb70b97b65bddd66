"""The execution mode `kubernetes`: each command has its own pod, which outlives the task's process.

The task creates the pod, or finds the pod that an earlier try left running, and defers: it holds no worker while the
pod runs. Airflow's trigger watches the pod and copies its log lines. When the trigger fires, the task copies the
remaining lines, takes the result from the container's termination message, and deletes the pod. Needs the extra
`kubernetes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.sdk.exceptions import TaskDeferred
from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from conversion_lib.core.documents import parse_json
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.shown import one_line
from ferry_airflow.execution.base import (
    ERROR_PREFIX,
    CommandResult,
    ExecutionMode,
    StageCommand,
    TaskIdentity,
    TaskLog,
    failure,
)
from ferry_airflow.execution.pod import CONTAINER, PodSettings, secret_for, selector, specification

if TYPE_CHECKING:
    from kubernetes.client import CoreV1Api, V1Pod  # type: ignore[import-untyped]

RESUME = "resume"
"""The operator's method that gets the trigger's event."""

SHOWN_CHARACTERS = 300
"""Of what the API answers."""

WRONG = {400, 401, 403, 404, 422}
"""HTTP statuses with which the API refuses a request that it would refuse again."""


class KubernetesPod(ExecutionMode):
    """The execution mode `kubernetes`."""

    def __init__(self, settings: PodSettings) -> None:
        self._settings = settings
        self._pod: tuple[str, str] | None = None

    def run(self, command: StageCommand, secrets: Mapping[str, str], task: TaskIdentity, log: TaskLog) -> CommandResult:
        with _explained("creating a pod"):
            found = self._find(task, log)
            pod = found or self._create(command, secrets, task)
            self._pod = (pod.metadata.name, pod.metadata.namespace)
            self._hand_over(pod, secrets)
        log.info("%s: %s in pod %s", "Attached to" if found else "Running", command, pod.metadata.name)
        raise self._deferred(pod)

    def resume(
        self, command: StageCommand, secrets: Mapping[str, str], event: Mapping[str, Any], log: TaskLog
    ) -> CommandResult:
        name, namespace = event["name"], event["namespace"]
        self._pod = (name, namespace)
        with _explained(f"pod {name}"):
            pod = self._read(name, namespace)
            if pod is None:
                raise OutsideFailure(f"pod {name} is gone before its command ended: evicted, or its node was lost")
            lines = self._lines(pod)
            _copy(lines, event.get("last_log_time"), log)
            if pod.status.phase in ("Pending", "Running"):
                self._delete(name, namespace)
                raise OutsideFailure(f"deleted pod {name} before it ended: {_one_line(event.get('message'))}")
            self._delete(name, namespace)
        return _result(command, pod, lines[-1][1] if lines else "")

    def kill(self) -> None:
        """Deletes the pod. Kubernetes ends it with SIGTERM, and with SIGKILL after its grace period."""
        if self._pod is not None:
            self._delete(*self._pod)

    @cached_property
    def _hook(self) -> KubernetesHook:
        return KubernetesHook(conn_id=self._settings.connection)

    @property
    def _api(self) -> CoreV1Api:
        return self._hook.core_v1_client

    def _find(self, task: TaskIdentity, log: TaskLog) -> V1Pod | None:
        """The pod of an earlier try of this task, running or succeeded. A failed pod is deleted."""
        found = None
        for pod in self._api.list_namespaced_pod(self._settings.namespace, label_selector=selector(task)).items:
            if pod.metadata.deletion_timestamp is None and pod.status.phase != "Failed":
                found = pod
            elif pod.metadata.deletion_timestamp is None:
                log.info("Removing the failed pod %s of an earlier try", pod.metadata.name)
                self._delete(pod.metadata.name, pod.metadata.namespace)
        return found

    def _create(self, command: StageCommand, secrets: Mapping[str, str], task: TaskIdentity) -> V1Pod:
        body = specification(self._settings, command, secrets, task)
        return self._api.create_namespaced_pod(self._settings.namespace, body)

    def _hand_over(self, pod: V1Pod, secrets: Mapping[str, str]) -> None:
        """Creates the Secret that the pod's container waits for, unless an earlier try has created it.

        If the API refuses the Secret, the pod is deleted: it would wait forever.
        """
        if not secrets:
            return
        owner = {"name": pod.metadata.name, "namespace": pod.metadata.namespace, "uid": pod.metadata.uid}
        try:
            self._api.create_namespaced_secret(pod.metadata.namespace, secret_for(owner, secrets))
        except ApiException as error:
            if error.status in WRONG:
                self._delete(pod.metadata.name, pod.metadata.namespace)
            if error.status != 409:
                raise

    def _deferred(self, pod: V1Pod) -> TaskDeferred:
        trigger = KubernetesPodTrigger(
            pod_name=pod.metadata.name,
            pod_namespace=pod.metadata.namespace,
            trigger_start_time=datetime.now(UTC),
            base_container_name=CONTAINER,
            kubernetes_conn_id=self._settings.connection,
            poll_interval=self._settings.poll_seconds,
            startup_check_interval=self._settings.poll_seconds,
            startup_timeout=self._settings.startup_seconds,
            schedule_timeout=self._settings.startup_seconds,
            logging_interval=self._settings.log_seconds,
        )
        return TaskDeferred(trigger=trigger, method_name=RESUME)

    def _read(self, name: str, namespace: str) -> V1Pod | None:
        try:
            return self._api.read_namespaced_pod(name, namespace)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def _lines(self, pod: V1Pod) -> list[tuple[str, str]]:
        """The container's log, a few lines a minute, as times (UTC, ISO 8601) and texts.

        Empty if the container never started, or is lost with its node.
        """
        name, namespace = pod.metadata.name, pod.metadata.namespace
        try:
            # the raw answer: of a text, the client returns the repr of its bytes
            answer = self._api.read_namespaced_pod_log(
                name, namespace, container=CONTAINER, timestamps=True, _preload_content=False
            )
        except ApiException as error:
            if error.status in (400, 404):
                return []
            raise
        parts = (line.partition(" ") for line in answer.data.decode(errors="replace").splitlines())
        return [(time, text) for time, _, text in parts if text.strip()]

    def _delete(self, name: str, namespace: str) -> None:
        try:
            self._api.delete_namespaced_pod(name, namespace)
        except ApiException as error:
            if error.status != 404:
                raise


def execution_mode(stage: str, options: Mapping[str, Any]) -> KubernetesPod:
    """Returns the mode of a stage.

    Args:
        stage: Its own settings replace the common ones.
        options: The section `kubernetes` of the file that FERRY_EXECUTION names.

    Raises:
        ValidationError: The options do not fit PodSettings.
    """
    return KubernetesPod(PodSettings.model_validate(options).of_stage(stage))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns the API's errors into one line: BadInput if a retry does not help, else OutsideFailure."""
    try:
        yield
    except ApiException as error:
        kind = BadInput if error.status in WRONG else OutsideFailure
        raise kind(f"{what}: the Kubernetes API answers {error.status} {_message(error)}") from error
    except HTTPError as error:
        raise OutsideFailure(f"{what}: the Kubernetes API cannot be reached: {_one_line(error)}") from error


def _message(error: ApiException) -> str:
    try:
        body = error.body or b"{}"
        answer = parse_json(body.encode() if isinstance(body, str) else body, "the answer")
    except BadInput:
        answer = {}
    return _one_line(answer.get("message") or error.reason)


def _one_line(text: object) -> str:
    return one_line(text, SHOWN_CHARACTERS)


def _copy(lines: list[tuple[str, str]], seen: datetime | None, log: TaskLog) -> None:
    """Copies the lines that the trigger has not copied: those since the second in which it looked last."""
    begin = seen.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S") if seen else ""
    for time, text in lines:
        if time >= begin:
            write = log.error if text.startswith(ERROR_PREFIX) else log.info
            write("%s", one_line(text))


def _result(command: StageCommand, pod: V1Pod, last_line: str) -> CommandResult:
    """The result in the status of a pod that has ended.

    Raises StageFailed if its command failed, and OutsideFailure if it never ran or left no result.
    """
    ended = next((s.state.terminated for s in pod.status.container_statuses or [] if s.name == CONTAINER), None)
    if ended is None:
        why = f"{pod.status.reason or pod.status.phase}: {pod.status.message or 'no reason given'}"
        raise OutsideFailure(f"pod {pod.metadata.name} ended without running {command.name}: {_one_line(why)}")
    try:
        result: CommandResult | None = parse_json((ended.message or "").encode(), "the termination message")
    except BadInput:
        result = None
    if ended.exit_code:
        why = pod.status.reason or ended.reason or "Error"  # such as Evicted, OOMKilled
        ending = f"ended with exit code {ended.exit_code} ({why})"
        exit_code = OutsideFailure.exit_code if why in ("Evicted", "OOMKilled") else ended.exit_code
        raise failure(command, exit_code, ending, last_line, result or {})
    if result is None:
        raise OutsideFailure(f"{command.name} succeeded in pod {pod.metadata.name} but left no result")
    return result
