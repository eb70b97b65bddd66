"""The one base of all stages: runs a ferry command somewhere, tells Airflow how it ended, leaves a manifest."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.sdk.log import mask_secret

from conversion_lib.errors import BadInput, CheckFailed, FerryError
from operators.layout import save_manifest
from operators.local import LocalSubprocess
from operators.place import Place, StageFailed

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.types import TaskInstanceKey

Manifest = dict[str, Any]
"""What a stage leaves for the next through XCom: a few strings and numbers.

In every manifest: `stage`, `path` (or `url`), `seconds`, `bytes_in`, `bytes_out`, `peak_bytes` (resident
memory at its highest; None where no process of its own ran), and what is handed on from stage to stage:
`repo`, `commit`, `work_dir`.
"""


class OutputLink(BaseOperatorLink):
    """The button on a task that leads to what it made: a checkpoint, a report."""

    name = "Output"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The task's process calls it when the task has ended, well or not."""
        return browsable(getattr(operator, "link_target", None) or "")


class StageOperator(BaseOperator):
    """What all stages share. A stage says in `work` what it does.

    :param place: where the ferry command runs; default: a subprocess on this worker (`local.py`)
    :param hf_conn_id: Airflow connection whose password is the Hub token; the command gets it in its
        environment, as HF_TOKEN; default None: HF_TOKEN of the worker's environment, where set
    """

    stage: ClassVar[str]
    operator_extra_links = (OutputLink(),)

    def __init__(self, *, place: Place | None = None, hf_conn_id: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.place = place or LocalSubprocess()
        self.hf_conn_id = hf_conn_id
        self.link_target: str | None = None

    @abstractmethod
    def work(self) -> Manifest:
        """Does what the stage does; returns what its manifest says beyond `stage`."""

    def execute(self, context: Context) -> Manifest:
        """Runs the stage. Wrong input and a failed check fail the task for good; all else may be retried."""
        started = time.monotonic()
        manifest: Manifest = {"stage": self.stage, "bytes_in": 0, "bytes_out": 0, "peak_bytes": None}
        try:
            manifest |= self.work()
        except FerryError as error:
            manifest |= error.result if isinstance(error, StageFailed) else {}
            self._save(context, {**manifest, "error": str(error), "exit_code": error.exit_code})
            final = error.exit_code in (BadInput.exit_code, CheckFailed.exit_code)
            raise (AirflowFailException if final else AirflowException)(str(error)) from None
        manifest.setdefault("seconds", round(time.monotonic() - started, 3))
        self._save(context, manifest)
        return manifest

    def on_kill(self) -> None:
        """Ends the running command: SIGTERM, then SIGKILL for what does not listen."""
        self.place.kill()

    def ferry(self, *arguments: str) -> Manifest:
        """Runs `ferry <arguments> --json` and returns its result."""
        return self.place.run([*arguments, "--json"], self._secrets(), self.log)

    @contextmanager
    def hub_token(self) -> Iterator[None]:
        """Work in this process finds the token where a subprocess would: in HF_TOKEN."""
        before = os.environ.get("HF_TOKEN")
        os.environ.update(self._secrets())
        try:
            yield
        finally:
            os.environ.pop("HF_TOKEN", None)
            if before is not None:
                os.environ["HF_TOKEN"] = before

    def _secrets(self) -> dict[str, str]:
        """Environment variables for the command, which go nowhere else."""
        token = os.environ.get("HF_TOKEN")
        if self.hf_conn_id:
            from airflow.sdk import BaseHook

            token = BaseHook.get_connection(self.hf_conn_id).password
        if not token:
            return {}
        mask_secret(token)
        return {"HF_TOKEN": token}

    def _save(self, context: Context, manifest: Manifest) -> None:
        map_index = context["ti"].map_index
        name = self.task_id if map_index is None or map_index < 0 else f"{self.task_id}-{map_index}"
        self.log.info("Manifest: %s", save_manifest(context["run_id"], name, manifest))


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


def handed_on(source: str | Mapping[str, Any]) -> Manifest:
    """What a stage hands on of the manifest before it: which source this is, and where it is worked on."""
    if isinstance(source, str):
        return {}
    return {key: source[key] for key in ("repo", "commit", "work_dir") if key in source}


def picked(result: Mapping[str, Any], *keys: str) -> Manifest:
    """What is kept of a ferry command's result: its measures, and these keys where it has them."""
    return {key: result[key] for key in ("seconds", "bytes_in", "bytes_out", "peak_bytes", *keys) if key in result}


def browsable(location: str) -> str:
    """A link for a path or gs:// address."""
    if location.startswith("gs://"):
        return "https://console.cloud.google.com/storage/browser/" + location.removeprefix("gs://")
    return Path(location).as_uri() if location.startswith("/") else location
