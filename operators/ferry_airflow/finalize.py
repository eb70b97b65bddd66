"""The stage `finalize`: merges the parts of a conversion and commits the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from conversion_lib.errors import BadInput
from ferry_airflow.base import StageManifest, StageOperator, handed_on, picked
from ferry_airflow.execution.base import CommandResult, StageCommand


class FinalizeOperator(StageOperator):
    """Merges the parts of a conversion into one checkpoint and commits it. It moves no data.

    A conversion in one part is already committed; then the task only says so.

    :param parts: the manifests of `convert`, one for each part (templated): the output of the mapped task
    :param execution: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `path` (the MaxText checkpoint), `target`, `fingerprint`, `parts` (how many), `chunks` and
        `already` (it was already committed)
    """

    stage: ClassVar[str] = "finalize"
    template_fields: Sequence[str] = ("parts",)

    def __init__(self, *, parts: Iterable[Mapping[str, Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = parts

    def command(self) -> StageCommand:
        self.link_target = str(self._manifests()[0]["path"])
        return StageCommand(("finalize", self.link_target), StageCommand.REDO)

    def inputs(self) -> list[object]:
        return [*self.parts] if self.parts else [None]

    def manifest(self, result: CommandResult) -> StageManifest:
        manifests = self._manifests()
        kept = picked(result, "path", "fingerprint", "chunks", "already")
        return {**kept, "parts": len(manifests), **handed_on(manifests[0])}

    def _manifests(self) -> list[Mapping[str, Any]]:
        """The manifests of the parts. Raises BadInput if they name different directories."""
        manifests = list(self.parts)
        paths = sorted({str(manifest["path"]) for manifest in manifests})
        if len(paths) != 1:
            raise BadInput(f"all parts of a conversion must write to one directory; these wrote to {paths}")
        return manifests
