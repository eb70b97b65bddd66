"""The stage `export`: converts a MaxText checkpoint to Hugging Face."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ferry_airflow.base import StageManifest, StageOperator, picked
from ferry_airflow.execution.base import CommandResult, StageCommand
from ferry_airflow.layout import work_root


class ExportOperator(StageOperator):
    """Writes a checkpoint that transformers loads.

    A directory as the destination is written directly. For another destination, the working directory is written, and
    `upload` uploads it.

    :param checkpoint: absolute path or `gs://` URL of a MaxText checkpoint (templated)
    :param destination: absolute directory, `gs://bucket/prefix` or `hf://org/name` (templated)
    :param hf_config: directory with config.json and the tokenizer's files (templated); default None: the `hf`
        directory of a checkpoint that Ferry wrote
    :param dtype: dtype of the weights: `bfloat16` (default), `float32` or `float16` (templated)
    :param execution: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `path` (the Hugging Face checkpoint), `fingerprint`, `already` (it was already complete)
        and `destination`
    """

    stage: ClassVar[str] = "export"
    template_fields: Sequence[str] = ("checkpoint", "destination", "hf_config", "dtype")

    def __init__(
        self,
        *,
        checkpoint: str,
        destination: str,
        hf_config: str | None = None,
        dtype: str = "bfloat16",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.checkpoint = checkpoint
        self.destination = destination
        self.hf_config = hf_config
        self.dtype = dtype

    def command(self) -> StageCommand:
        self.link_target = self._directory()
        options = ["--hf-config", self.hf_config] if self.hf_config else []
        return StageCommand(("export", self.checkpoint, self.link_target, "--dtype", self.dtype, *options))

    def manifest(self, result: CommandResult) -> StageManifest:
        return {**picked(result, "path", "fingerprint", "already"), "destination": self.destination}

    def _directory(self) -> str:
        """The directory to write: the destination, or a working directory that a retry finds again."""
        if self.destination.startswith("/"):
            return self.destination
        name = Path(self.checkpoint.rstrip("/")).name
        digest = hashlib.sha256(f"{self.checkpoint} {self.hf_config} {self.dtype}".encode()).hexdigest()
        return str(work_root() / "exports" / f"{name}-{digest[:12]}")
