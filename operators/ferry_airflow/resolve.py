"""The stage `resolve`: pins the commit for the whole run, and plans what the run needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from conversion_lib.errors import BadInput
from ferry_airflow.base import StageManifest, picked
from ferry_airflow.choices import OVERWRITE, STAGED
from ferry_airflow.execution.base import CommandResult, StageCommand
from ferry_airflow.target import TargetOperator


class ResolveOperator(TargetOperator):
    """Asks the Hub for the commit of a revision. All later stages use that commit only.

    It plans the conversion from headers alone and logs the plan. It fails if the plan does not fit on the disk where it
    runs, or if it cannot write to the destination. If the checkpoint is already published there, the rest of the run is
    skipped.

    `scan_layers`, `save_dtype`, `ocdbt`, `zarr3` and `maxtext` are as in TargetOperator.

    :param repo: Hub repository (`org/name`), or the absolute path of a directory on the worker (templated)
    :param destination: where the run publishes, `gs://bucket/prefix` or an absolute directory (templated)
    :param revision: branch, tag or commit (templated); default `main`; ignored for a directory
    :param model_name: name of the model in Ferry's catalogue (templated); default None: found from the config
    :param dequantize: `staged` (default) or `fused`, as in DequantizeOperator (templated); with `staged` the plan
        counts a bf16 copy on disk
    :param overwrite: `download`, `dequantize`, `convert` or `check`: what this stage and those after it made earlier is
        removed, and a published checkpoint does not end the run (templated); default None: earlier results are used
    :param hf_conn_id: as in StageOperator
    :param execution: as in StageOperator
    :returns: manifest with `repo`, `commit` (None for a directory), `files` (how many), `path` (where the source is
        or will be), `work_dir` (where the run keeps its files), `quantized`, `model` (its published name),
        `published` (URL of the checkpoint if already published, else None) and `plan`: `family`, `bytes_in`,
        `bytes_out`, `download_bytes`, `disk_bytes` (needed), `free_bytes` (on that disk), `peak_bytes` (of memory)
        and `seconds` (expected); and `maxtext`: the `settings` that a MaxText run passes, and how MaxText's model
        `differs` (in words)
    """

    stage: ClassVar[str] = "resolve"
    template_fields: Sequence[str] = (
        "repo",
        "revision",
        "destination",
        "model_name",
        "dequantize",
        "overwrite",
        *TargetOperator.template_fields,
    )

    def __init__(
        self,
        *,
        repo: str,
        destination: str,
        revision: str = "main",
        model_name: str | None = None,
        dequantize: str = STAGED,
        overwrite: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.repo = repo
        self.destination = destination
        self.revision = revision
        self.model_name = model_name
        self.dequantize = dequantize
        self.overwrite = overwrite

    def command(self) -> StageCommand:
        arguments = ["resolve", self.repo, "--revision", self.revision, "--destination", self.destination]
        arguments += ["--run", self.run_name, "--dequantize", self.dequantize]
        arguments += ["--model", self.model_name] if self.model_name else []
        if self.overwrite is not None and self.overwrite not in OVERWRITE:
            raise BadInput(f"overwrite is {self.overwrite!r}: expected one of {', '.join(OVERWRITE)}")
        arguments += ["--overwrite", self.overwrite] if self.overwrite else []
        return StageCommand((*arguments, *self.target_arguments()), StageCommand.STEPS)

    def manifest(self, result: CommandResult) -> StageManifest:
        self.link_target = str(result["published"] or result["path"])
        return picked(
            result,
            *("repo", "commit", "files", "path", "work_dir", "quantized", "model", "published", "plan", "maxtext"),
        )
