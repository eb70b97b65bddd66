"""The base of all stages: runs a command, tells Airflow how it ended, and leaves a manifest."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.exceptions import AirflowNotFoundException, AirflowSkipException, TaskDeferred
from airflow.sdk.log import mask_secret

from conversion_lib.core.plain_json import finite
from conversion_lib.errors import BadInput, FerryError
from ferry_airflow.execution import Configured, configured
from ferry_airflow.execution.base import (
    WAITS_FOR,
    CommandResult,
    ExecutionMode,
    StageCommand,
    StageFailed,
    TaskIdentity,
)
from ferry_airflow.layout import run_name, save_manifest
from ferry_airflow.links import browsable, tab_of
from ferry_airflow.params import StableParam
from ferry_airflow.retries import StageRetryPolicy, final
from ferry_airflow.waiting import wait_for

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.definitions.mappedoperator import OperatorPartial
    from airflow.sdk.definitions.retry_policy import RetryPolicy
    from airflow.sdk.types import TaskInstanceKey

StageManifest = dict[str, Any]
"""What a stage passes to the next one through XCom: a few strings and numbers.

Every manifest has `stage`, `path` (or `url`), `seconds`, `bytes_in`, `bytes_out` and `peak_bytes` (peak resident
memory; None if no command ran), and what each stage hands on to the next: `repo`, `commit`, `work_dir`, `quantized`,
`target`. It is valid JSON: a number that is not finite is text, such as `NaN`.
"""

FAILURE_KEY = "failure"
"""The XCom key of a failed stage's manifest: the error and, for a check, its figures."""

FAILURE_FIELDS = (
    *("stage", "error", "exit_code", "seconds", "bytes_in", "bytes_out", "peak_bytes"),
    *("verdict", "weights", "model", "max_kl", "mean_kl", "max_abs_diff", "top1", "top10", "digest", "report"),
)

DEFAULT_POLICY = StageRetryPolicy()

HANDED_ON = ("repo", "commit", "work_dir", "quantized", "target")


class OutputLink(BaseOperatorLink):
    """The button on a task that opens its output: a checkpoint or a report.

    If the output is in a directory, the button opens the run's tab, which shows the path. A browser cannot open a file
    on another machine, and Airflow shows no button for such a link.
    """

    name = "Output"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Returns the link; empty if there is none. The task's process calls this when the task succeeds or fails."""
        target = getattr(operator, "link_target", None) or ""
        return tab_of(ti_key.dag_id, ti_key.run_id) if target.startswith("/") else browsable(target)


class StageOperator(BaseOperator):
    """The base of all stages. `command` says what to run, and `manifest` what to keep of the result.

    Wrong input and a failed check are never retried, whatever `retry_policy` and `retries` say.

    :param execution: where and how the command runs; default None: as the file says that FERRY_EXECUTION names, or,
        without one, in a subprocess on this worker
    :param hf_conn_id: Airflow connection whose password is the Hub token. The command gets the token in its
        environment, as HF_TOKEN. Default None: HF_TOKEN of the worker's environment, if set
    :param retry_policy: when to retry other errors; default, and for None: StageRetryPolicy of `ferry_airflow.retries`
    """

    stage: ClassVar[str]
    operator_extra_links = (OutputLink(),)

    def __init__(
        self,
        *,
        execution: ExecutionMode | None = None,
        hf_conn_id: str | None = None,
        # Airflow's `partial` takes the default from this signature, and would pass None without it
        retry_policy: RetryPolicy | None = DEFAULT_POLICY,
        **kwargs: Any,
    ) -> None:
        super().__init__(retry_policy=retry_policy or DEFAULT_POLICY, **kwargs)
        self.execution = execution
        self.hf_conn_id = hf_conn_id
        self.link_target: str | None = None
        self.run_name = self.run_id = ""
        self._running: ExecutionMode | None = None

    @classmethod
    def partial(cls, **kwargs: Any) -> OperatorPartial:
        """Returns what `expand` maps, as in Airflow. An argument may be, or contain, a `dag.param`."""
        return super().partial(**{name: StableParam.in_place_of(value) for name, value in kwargs.items()})

    @abstractmethod
    def command(self) -> StageCommand | StageManifest:
        """Returns the command to run, or the stage's manifest if there is nothing to run.

        Raises:
            BadInput: A parameter or the manifest before is wrong.
            AirflowSkipException: The task and all that follow are to be skipped.
        """

    def inputs(self) -> list[object]:
        """Returns the manifests and paths that the stage was given."""
        return []

    @abstractmethod
    def manifest(self, result: CommandResult) -> StageManifest:
        """Returns what the stage's manifest keeps of the command's result. `execute` adds `stage`."""

    def execute(self, context: Context) -> StageManifest:
        """Runs the stage and returns its manifest, which goes to XCom and to the working directory.

        Raises:
            BadInput: The input or the configuration is wrong. Not retried.
            CheckFailed: The check failed. Not retried.
            Terminated: SIGTERM ended the command. Retried.
            OutsideFailure: Any other failure, such as an outage or a crash. Retried.
            AirflowSkipException: There is nothing to do.
            WaitedTooLong: Another run has worked at the same place for FERRY_WAIT_HOURS. Not retried.
            TaskDeferred: The execution mode does not wait; `resume` continues. Or another run works at the same place;
                `try_again` tries again.
        """
        return self.try_again(context)

    def try_again(self, context: Context, event: object = None, since: float | None = None) -> StageManifest:
        """Runs the stage, as `execute` does. `since`: the Unix time since when the task waits for another run."""
        return self._stage(
            context, since, lambda mode, command: mode.run(command, self._secrets(), task(context), self.log)
        )

    def resume(self, context: Context, event: Mapping[str, Any], since: float | None = None) -> StageManifest:
        """Continues after the trigger of a deferred task fired with `event`; returns and raises as `execute` does."""
        return self._stage(context, since, lambda mode, command: mode.resume(command, self._secrets(), event, self.log))

    def on_kill(self) -> None:
        """Ends the running command: a subprocess gets SIGTERM, then SIGKILL if it does not end; a pod is deleted."""
        if self._running:
            self._running.kill()

    def _stage(
        self, context: Context, since: float | None, run: Callable[[ExecutionMode, StageCommand], CommandResult]
    ) -> StageManifest:
        started = time.monotonic()
        self.run_id = context["run_id"]
        self.run_name = run_name(context["ti"].dag_id, self.run_id)
        manifest: StageManifest = {"stage": self.stage, "bytes_in": 0, "bytes_out": 0, "peak_bytes": None}
        try:
            if None in self.inputs():
                raise BadInput(
                    "a task before this one left no result, as one that is marked successful by hand: clear that one"
                )
            command = self.command()
            if isinstance(command, StageCommand):
                where = Configured(self.execution) if self.execution else configured(self.stage)
                self._running = where.mode
                command = replace(command, arguments=(*command.arguments, *where.options))
                manifest |= self.manifest(self._run(where.mode, command, since, run))
            else:
                manifest |= command
        except FerryError as error:
            failed = error if isinstance(error, StageFailed) else None
            manifest |= failed.result if failed else {}
            manifest = finite(manifest | {"error": str(error), "exit_code": error.exit_code})
            self._save(context, manifest)
            context["ti"].xcom_push(FAILURE_KEY, {key: manifest[key] for key in manifest if key in FAILURE_FIELDS})
            raise final(failed.meaning if failed else type(error))(str(error)) from None
        manifest.setdefault("seconds", round(time.monotonic() - started, 3))
        manifest = finite(manifest)
        self._save(context, manifest)
        self.after(context, manifest)
        return manifest

    def _run(
        self,
        mode: ExecutionMode,
        command: StageCommand,
        since: float | None,
        run: Callable[[ExecutionMode, StageCommand], CommandResult],
    ) -> CommandResult:
        """Runs the command. Raises TaskDeferred to wait for another run, or if the mode does not wait."""
        try:
            return run(mode, command)
        except StageFailed as failed:
            if holder := failed.result.get(WAITS_FOR):
                raise wait_for(failed, str(holder), since, self.log) from None
            if gone := failed.result.get("gone"):
                raise BadInput(f"{gone} is gone: clear {maker_of(gone, self.inputs())} as well") from None
            raise
        except TaskDeferred as deferred:  # the mode's own: it hands on since when the task waits
            deferred.kwargs = {**(deferred.kwargs or {}), "since": since}
            raise

    def after(self, context: Context, manifest: StageManifest) -> None:
        """Tells Airflow more than the manifest after a stage has succeeded. By default nothing."""
        return

    def _secrets(self) -> dict[str, str]:
        """Environment variables for the command only."""
        token = hub_token(self.hf_conn_id)
        return {"HF_TOKEN": token} if token else {}

    def _save(self, context: Context, manifest: StageManifest) -> None:
        identity = task(context)
        name = self.task_id if identity.map_index < 0 else f"{self.task_id}-{identity.map_index}"
        self.log.info("Manifest: %s", save_manifest(self.run_name, name, manifest))


def hub_token(conn_id: str | None) -> str:
    """Returns the Hub token, which Airflow masks in logs from then on.

    Args:
        conn_id: The Airflow connection whose password is the token. None or empty: HF_TOKEN of the environment.

    Returns:
        The token; empty if there is none.

    Raises:
        BadInput: The connection does not exist.
    """
    if not conn_id:
        token = os.environ.get("HF_TOKEN", "")
    else:
        from airflow.sdk import BaseHook

        try:
            token = BaseHook.get_connection(conn_id).password or ""
        except AirflowNotFoundException as error:
            raise BadInput(f"no Airflow connection {conn_id}: create it, with the Hub token as its password") from error
    if token:
        mask_secret(token)
    return token


def task(context: Context) -> TaskIdentity:
    """Returns which task is running."""
    ti = context["ti"]
    map_index = -1 if ti.map_index is None else ti.map_index
    return TaskIdentity(ti.dag_id, context["run_id"], ti.task_id, map_index)


def skip_published(source: Mapping[str, Any]) -> None:
    """Skips the task and all that follow if `resolve` found the checkpoint already published.

    Args:
        source: The manifest of `resolve`.

    Raises:
        AirflowSkipException: The checkpoint is published and checked.
    """
    if source.get("published"):
        raise AirflowSkipException(f"already published and checked, nothing to do: {source['published']}")


def maker_of(path: str, inputs: Iterable[object]) -> str:
    """Returns which task makes a path, as far as the manifests that a stage was given tell."""
    for one in inputs:
        if isinstance(one, Mapping) and one.get("path") == path and one.get("stage"):
            stage = "download" if one.get("skipped") else str(one["stage"])
            # these two pass on what convert writes
            return f"the task `{'convert' if stage in ('finalize', 'check') else stage}`"
    return "the task that makes it"


def path_in(source: str | Mapping[str, Any]) -> str:
    """Returns the path that a stage was given, directly or in the manifest of the stage before."""
    return source if isinstance(source, str) else str(source["path"])


def directory_for(destination: str | None, source: str | Mapping[str, Any], name: str) -> Path:
    """Returns the directory that a stage writes to.

    Args:
        destination: The directory, if the operator names one.
        source: The manifest of the stage before, which names the run's working directory; or a path.
        name: The directory's name in the working directory, used if `destination` is None or empty.

    Raises:
        BadInput: There is neither a destination nor a working directory.
    """
    if destination:
        return Path(destination)
    if isinstance(source, str) or "work_dir" not in source:
        raise BadInput("a source that is a path needs a destination: only a manifest names a working directory")
    return Path(source["work_dir"]) / name


def handed_on(source: str | Mapping[str, Any]) -> StageManifest:
    """Returns what a stage hands on from the manifest before: the source and its working directory."""
    if isinstance(source, str):
        return {}
    return {key: source[key] for key in HANDED_ON if key in source}


def picked(result: Mapping[str, Any], *keys: str) -> StageManifest:
    """Returns what a manifest keeps of a command's result: the measures and `keys`, as far as the result has them."""
    return {key: result[key] for key in ("seconds", "bytes_in", "bytes_out", "peak_bytes", *keys) if key in result}
