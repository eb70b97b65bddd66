"""The stage `dequantize`: writes a quantized Hugging Face checkpoint as a bf16 Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ferry_airflow.base import StageManifest, StageOperator, directory_for, handed_on, path_in, picked
from ferry_airflow.choices import FUSED, STAGED
from ferry_airflow.execution.base import CommandResult, StageCommand
from ferry_airflow.layout import DEQUANTIZED


class DequantizeOperator(StageOperator):
    """Writes the source in bf16, or passes it on unchanged if no bf16 copy is needed.

    :param source: the manifest of `download`, or the path of a quantized Hugging Face checkpoint (templated)
    :param mode: `staged` (default): write a bf16 checkpoint, so that `convert` has its own retry. `fused`: pass the
        source on, and `convert` dequantizes while it reads, which reads the data one time less. The bits are the same
        (templated)
    :param destination: directory to write (templated); default None: `bf16` in the manifest's working directory
    :param execution: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `path` (what `convert` reads), `skipped` (the source was passed on) and, if it was not,
        `fingerprint` and `already` (the bf16 checkpoint was already complete)
    """

    stage: ClassVar[str] = "dequantize"
    template_fields: Sequence[str] = ("source", "mode", "destination")

    def __init__(
        self,
        *,
        source: str | Mapping[str, Any],
        mode: str = STAGED,
        destination: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.mode = mode
        self.destination = destination

    def command(self) -> StageCommand | StageManifest:
        path = path_in(self.source)
        reason = self._reason_to_skip()
        if reason:
            self.log.info("Passing on %s: %s", path, reason)
            self.link_target = path
            return {"path": path, "skipped": True, **handed_on(self.source)}
        self.link_target = str(directory_for(self.destination, self.source, DEQUANTIZED))
        return StageCommand(("dequantize", path, self.link_target), StageCommand.REDO)

    def inputs(self) -> list[object]:
        return [self.source]

    def manifest(self, result: CommandResult) -> StageManifest:
        return {**picked(result, "path", "fingerprint", "already"), "skipped": False, **handed_on(self.source)}

    def _reason_to_skip(self) -> str | None:
        if self.mode == FUSED:
            return "convert dequantizes while it reads"
        if not isinstance(self.source, str) and self.source.get("quantized") is False:
            return "it is not quantized"
        return None
