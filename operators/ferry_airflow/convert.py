"""The stage `convert`: converts a Hugging Face checkpoint, or one part of it, to MaxText."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ferry_airflow.base import StageManifest, directory_for, handed_on, path_in, picked
from ferry_airflow.execution.base import CommandResult, StageCommand
from ferry_airflow.target import TargetOperator


class ConvertOperator(TargetOperator):
    """Converts a checkpoint. If the task is killed, the next try resumes from the journal.

    `scan_layers`, `save_dtype`, `ocdbt`, `zarr3` and `maxtext` are as in TargetOperator.

    :param source: the manifest of `dequantize`, or the path of a Hugging Face checkpoint (templated)
    :param model_name: name of the model in Ferry's catalogue (templated); default None: found from the config
    :param part: `I/N`: part I of N, counted from 0; FinalizeOperator merges the parts (templated). Default None, or
        `0/1`: the whole checkpoint, committed
    :param destination: directory to write (templated); default None: one named after the target in the manifest's
        working directory
    :param execution: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `path` (the MaxText checkpoint), `target`, `fingerprint`, `part`, `pieces`,
        `pieces_skipped` (written by an earlier try) and `already` (the checkpoint was already complete)
    """

    stage: ClassVar[str] = "convert"
    template_fields: Sequence[str] = ("source", "model_name", *TargetOperator.template_fields, "part", "destination")

    def __init__(
        self,
        *,
        source: str | Mapping[str, Any],
        model_name: str | None = None,
        part: str | None = None,
        destination: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.model_name = model_name
        self.part = part
        self.destination = destination

    def command(self) -> StageCommand:
        self.link_target = str(directory_for(self.destination, self.source, self.target.slug))
        options = ["--model", self.model_name] if self.model_name else []
        options += self.target_arguments()
        if self.part and not self.part.endswith("/1"):
            options += ["--part", self.part]
        return StageCommand(("convert", path_in(self.source), self.link_target, *options), StageCommand.REDO)

    def inputs(self) -> list[object]:
        return [self.source]

    def manifest(self, result: CommandResult) -> StageManifest:
        if skipped := result.get("pieces_skipped"):
            pieces = skipped + result["pieces"]
            self.log.info("Resumed: %d of %d pieces were written by an earlier try", skipped, pieces)
        kept = picked(result, "path", "fingerprint", "part", "pieces", "pieces_skipped", "already")
        return {**kept, **handed_on(self.source), "target": self.target.slug}
