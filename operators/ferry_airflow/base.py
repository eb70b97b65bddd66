"""The one base of all stages: runs a command somewhere, tells Airflow how it ended, leaves a manifest."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.exceptions import AirflowNotFoundException, AirflowSkipException
from airflow.sdk.log import mask_secret

from conversion_lib.errors import BadInput, FerryError
from ferry_airflow.execution import Configured, configured
from ferry_airflow.execution.base import CommandResult, ExecutionMode, StageCommand, StageFailed, TaskIdentity
from ferry_airflow.layout import save_manifest
from ferry_airflow.links import browsable, tab_of
from ferry_airflow.retries import StageRetryPolicy

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.types import TaskInstanceKey

StageManifest = dict[str, Any]
"""What a stage leaves for the next through XCom: a few strings and numbers.

In every manifest: `stage`, `path` (or `url`), `seconds`, `bytes_in`, `bytes_out`, `peak_bytes` (resident
memory at its highest; None where no command ran), and what is handed on from stage to stage:
`repo`, `commit`, `work_dir`, `quantized`, `target`.
"""

FAILURE_KEY = "failure"
"""The XCom key under which a stage that failed leaves what it has: an error, and of a check its figures."""

FAILURE_FIELDS = (
    *("stage", "error", "exit_code", "seconds", "bytes_in", "bytes_out", "peak_bytes"),
    *("verdict", "max_kl", "mean_kl", "max_abs_diff", "top1", "top10", "digest", "report"),
)

HANDED_ON = ("repo", "commit", "work_dir", "quantized", "target")


class OutputLink(BaseOperatorLink):
    """The button on a task that leads to what it made: a checkpoint, a report.

    Of what lies in a directory it leads to the run's tab, which says where that is: a browser opens no file of another
    machine, and Airflow shows no button for one.
    """

    name = "Output"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The task's process calls it when the task has ended, well or not."""
        target = getattr(operator, "link_target", None) or ""
        return tab_of(ti_key.dag_id, ti_key.run_id) if target.startswith("/") else browsable(target)


class StageOperator(BaseOperator):
    """What all stages share. A stage says in `command` what is to be run, and in `manifest` what came of it.

    Retries follow `ferry_airflow.retries` unless a `retry_policy` is given.

    :param execution: where and how the command runs; default None: as the configuration says (`execution/`), which is
        a subprocess on this worker where there is none
    :param hf_conn_id: Airflow connection whose password is the Hub token; the command gets it in its
        environment, as HF_TOKEN; default None: HF_TOKEN of the worker's environment, where set
    """

    stage: ClassVar[str]
    operator_extra_links = (OutputLink(),)

    def __init__(self, *, execution: ExecutionMode | None = None, hf_conn_id: str | None = None, **kwargs: Any) -> None:
        super().__init__(**{"retry_policy": StageRetryPolicy(), **kwargs})
        self.execution = execution
        self.hf_conn_id = hf_conn_id
        self.link_target: str | None = None
        self.run_id = ""
        self._running: ExecutionMode | None = None

    @abstractmethod
    def command(self) -> StageCommand | StageManifest:
        """The command to run; where nothing need be run, the stage's manifest. Raises BadInput."""

    @abstractmethod
    def manifest(self, result: CommandResult) -> StageManifest:
        """What the stage's manifest says of the command's result, beyond `stage`."""

    def execute(self, context: Context) -> StageManifest:
        """Runs the stage; wrong input, a failed check and all other failures are errors of different types."""
        return self._stage(context, lambda mode, command: mode.run(command, self._secrets(), task(context), self.log))

    def resume(self, context: Context, event: Mapping[str, Any]) -> StageManifest:
        """Continues when the trigger of an execution mode that had deferred has fired."""
        return self._stage(context, lambda mode, command: mode.resume(command, self._secrets(), event, self.log))

    def on_kill(self) -> None:
        """Ends the running command: locally SIGTERM, then SIGKILL for what does not listen; a pod is deleted."""
        if self._running:
            self._running.kill()

    def _stage(self, context: Context, run: Callable[[ExecutionMode, StageCommand], CommandResult]) -> StageManifest:
        started = time.monotonic()
        self.run_id = context["run_id"]
        manifest: StageManifest = {"stage": self.stage, "bytes_in": 0, "bytes_out": 0, "peak_bytes": None}
        try:
            command = self.command()
            if isinstance(command, StageCommand):
                where = Configured(self.execution) if self.execution else configured(self.stage)
                self._running = where.mode
                command = replace(command, arguments=(*command.arguments, *where.options))
                manifest |= self.manifest(run(where.mode, command))
            else:
                manifest |= command
        except FerryError as error:
            failed = error if isinstance(error, StageFailed) else None
            manifest |= failed.result if failed else {}
            manifest |= {"error": str(error), "exit_code": error.exit_code}
            self._save(context, manifest)
            context["ti"].xcom_push(FAILURE_KEY, {key: manifest[key] for key in manifest if key in FAILURE_FIELDS})
            raise (failed.meaning if failed else type(error))(str(error)) from None
        manifest.setdefault("seconds", round(time.monotonic() - started, 3))
        self._save(context, manifest)
        self.after(context, manifest)
        return manifest

    def after(self, context: Context, manifest: StageManifest) -> None:
        """What a stage tells Airflow when it has done well, beyond its manifest."""
        return

    def _secrets(self) -> dict[str, str]:
        """Environment variables for the command, which go nowhere else."""
        token = hub_token(self.hf_conn_id)
        return {"HF_TOKEN": token} if token else {}

    def _save(self, context: Context, manifest: StageManifest) -> None:
        identity = task(context)
        name = self.task_id if identity.map_index < 0 else f"{self.task_id}-{identity.map_index}"
        self.log.info("Manifest: %s", save_manifest(identity.run_id, name, manifest))


def hub_token(conn_id: str | None) -> str:
    """The password of an Airflow connection, or, without one, HF_TOKEN of the environment; empty where there is none.

    From here on Airflow masks it in logs. Raises BadInput where there is no such connection.
    """
    if not conn_id:
        token = os.environ.get("HF_TOKEN", "")
    else:
        from airflow.sdk import BaseHook

        try:
            token = BaseHook.get_connection(conn_id).password or ""
        except AirflowNotFoundException as error:
            raise BadInput(f"no Airflow connection {conn_id}: make it, with the Hub token as its password") from error
    if token:
        mask_secret(token)
    return token


def task(context: Context) -> TaskIdentity:
    """Which task it is that runs."""
    ti = context["ti"]
    map_index = -1 if ti.map_index is None else ti.map_index
    return TaskIdentity(ti.dag_id, context["run_id"], ti.task_id, map_index)


def skip_published(source: Mapping[str, Any]) -> None:
    """Skips the task, and with it all that follow, where `resolve` found the checkpoint published already."""
    if source.get("published"):
        raise AirflowSkipException(f"already published and checked, nothing to do: {source['published']}")


def path_in(source: str | Mapping[str, Any]) -> str:
    """The path that a stage is given: as it is, or in the manifest of the stage before."""
    return source if isinstance(source, str) else str(source["path"])


def directory_for(destination: str | None, source: str | Mapping[str, Any], name: str) -> Path:
    """Where a stage writes: at `destination`, else under `name` in the working directory of the run's source."""
    if destination:
        return Path(destination)
    if isinstance(source, str) or "work_dir" not in source:
        raise BadInput("a source that is a path needs a destination: only a manifest knows its working directory")
    return Path(source["work_dir"]) / name


def handed_on(source: str | Mapping[str, Any]) -> StageManifest:
    """What a stage hands on of the manifest before it: which source this is, and where it is worked on."""
    if isinstance(source, str):
        return {}
    return {key: source[key] for key in HANDED_ON if key in source}


def picked(result: Mapping[str, Any], *keys: str) -> StageManifest:
    """What is kept of a command's result: its measures, and these keys where it has them."""
    return {key: result[key] for key in ("seconds", "bytes_in", "bytes_out", "peak_bytes", *keys) if key in result}
