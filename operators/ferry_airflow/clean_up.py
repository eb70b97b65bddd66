"""The stage `clean_up`: removes a run's files from the disk where it worked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from conversion_lib.errors import BadInput
from ferry_airflow.base import StageManifest, handed_on, picked
from ferry_airflow.choices import KEEP_ON_FAILURE, POLICIES
from ferry_airflow.execution.base import CommandResult, StageCommand
from ferry_airflow.target import TargetOperator


class CleanUpOperator(TargetOperator):
    """Removes a run's files as `keep_files` says. Files that another run uses stay.

    Make it a teardown: then it runs whatever happened, and does not change the run's state.

    `scan_layers`, `save_dtype`, `ocdbt`, `zarr3` and `maxtext` are as in TargetOperator.

    :param source: the manifest of `resolve`; None if `resolve` failed (templated)
    :param published: the manifest of `publish`; None if the run did not publish (templated)
    :param keep_files: `keep`: everything stays. `keep_on_failure` (default): after success only the download stays,
        for other targets of the model; after a failure everything stays, for a retry. `remove`: nothing stays
        (templated)
    :param execution: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `removed` (paths of directories) and `bytes_freed`
    """

    stage: ClassVar[str] = "clean_up"
    template_fields: Sequence[str] = ("source", "published", "keep_files", *TargetOperator.template_fields)

    def __init__(
        self,
        *,
        source: Mapping[str, Any] | None,
        published: Mapping[str, Any] | None,
        keep_files: str = KEEP_ON_FAILURE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.published = published
        self.keep_files = keep_files

    def command(self) -> StageCommand | StageManifest:
        if self.keep_files not in POLICIES:
            raise BadInput(f"keep_files is {self.keep_files!r}: expected one of {', '.join(POLICIES)}")
        if self.source is None or self.source.get("published"):
            self.log.info("The run wrote nothing: nothing to remove")
            return {"removed": [], "bytes_freed": 0}
        self.link_target = str(self.source["work_dir"])
        ended = "--succeeded" if self.published else "--failed"
        options = ["--run", self.run_name, "--target", self.target.slug, "--keep", self.keep_files, ended]
        return StageCommand(("clean-up", self.link_target, *options), StageCommand.STEPS)

    def manifest(self, result: CommandResult) -> StageManifest:
        return {**picked(result, "removed", "bytes_freed"), **handed_on(self.source or {})}
