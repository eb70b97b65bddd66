"""The stage `download`: downloads the source's files from the Hub to the disk where the stages work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ferry_airflow.base import StageManifest, StageOperator, handed_on, path_in, picked, skip_published
from ferry_airflow.execution.base import CommandResult, StageCommand


class DownloadOperator(StageOperator):
    """Downloads a repository at a commit. Files that are already complete are not downloaded again.

    :param source: the manifest of `resolve` (templated). If its `commit` is None, the source is a directory, and its
        path is passed on. If it has a `published` URL, the task and all that follow are skipped
    :param hf_conn_id: as in StageOperator
    :param execution: as in StageOperator
    :returns: manifest with `path` (the Hugging Face checkpoint), `files` (how many), `bytes` and `bytes_downloaded`
    """

    stage: ClassVar[str] = "download"
    template_fields: Sequence[str] = ("source",)

    def __init__(self, *, source: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source

    def command(self) -> StageCommand | StageManifest:
        skip_published(self.source)
        path = path_in(self.source)
        self.link_target = path
        if self.source["commit"] is None:
            self.log.info("The source is the directory %s: nothing to download", path)
            return {"path": path, **handed_on(self.source)}
        return StageCommand(("download", self.source["repo"], path, "--revision", self.source["commit"]))

    def inputs(self) -> list[object]:
        return [self.source]

    def manifest(self, result: CommandResult) -> StageManifest:
        return {**picked(result, "path", "files", "bytes", "bytes_downloaded"), **handed_on(self.source)}
