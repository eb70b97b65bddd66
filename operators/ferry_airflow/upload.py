"""The stage `upload`: uploads an exported checkpoint to its destination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ferry_airflow.base import StageManifest, StageOperator, picked
from ferry_airflow.execution.base import CommandResult, StageCommand


class UploadOperator(StageOperator):
    """Uploads an export to the Hub in one commit, or to Cloud Storage. For a directory, there is nothing to upload.

    :param source: the manifest of `export` (templated)
    :param private: whether a new repository on the Hub is private (templated); default True
    :param message: commit message on the Hub (templated); default `Export from MaxText`
    :param hf_conn_id: as in StageOperator; the token must allow writing
    :param execution: as in StageOperator
    :returns: manifest with `url`, `files` (how many) and, for the Hub, `commit`
    """

    stage: ClassVar[str] = "upload"
    template_fields: Sequence[str] = ("source", "private", "message")

    def __init__(
        self,
        *,
        source: Mapping[str, Any],
        private: bool = True,
        message: str = "Export from MaxText",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.private = private
        self.message = message

    def command(self) -> StageCommand | StageManifest:
        destination = str(self.source["destination"])
        self.link_target = destination
        if destination.startswith("/"):
            self.log.info("The export is in %s: nothing to upload", destination)
            return {"url": destination}
        options = ["--private" if self.private else "--public", "--message", self.message]
        return StageCommand(("upload", str(self.source["path"]), destination, *options), StageCommand.STEPS)

    def inputs(self) -> list[object]:
        return [self.source]

    def manifest(self, result: CommandResult) -> StageManifest:
        return picked(result, "url", "commit", "files")
