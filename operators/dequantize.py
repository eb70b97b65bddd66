"""The stage `dequantize`: an fp8 checkpoint to a bf16 one, Hugging Face to Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from conversion_lib.config import load_config
from operators.base import Manifest, StageOperator, directory_for, handed_on, path_in, picked


class DequantizeOperator(StageOperator):
    """Writes the source in bf16, or passes it on where that is not needed.

    :param source: the manifest of `download`, or the path of a Hugging Face checkpoint (templated)
    :param mode: `staged` (default): write a bf16 checkpoint, so that converting has a retry of its own;
        `fused`: pass the source on, and converting dequantizes as it reads: one pass less over the data
        (templated). The bits are the same.
    :param destination: directory to write (templated); default: `bf16` in the manifest's working directory
    :param place: as in StageOperator
    :returns: manifest with `path` (what converting is to read), `skipped` (the source was passed on) and,
        where it was not, `fingerprint` and `already` (it was there and whole)
    """

    stage: ClassVar[str] = "dequantize"
    template_fields: Sequence[str] = ("source", "mode", "destination")

    def __init__(
        self,
        *,
        source: str | Mapping[str, Any],
        mode: str = "staged",
        destination: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.mode = mode
        self.destination = destination

    def work(self) -> Manifest:
        path = path_in(self.source)
        reason = self._reason_to_skip(path)
        if reason:
            self.log.info("Passing on %s: %s", path, reason)
            self.link_target = path
            return {"path": path, "skipped": True, **handed_on(self.source)}
        destination = str(directory_for(self.destination, self.source, "bf16"))
        result = self.ferry("dequantize", path, destination)
        self.link_target = destination
        return {**picked(result, "path", "fingerprint", "already"), "skipped": False, **handed_on(self.source)}

    def _reason_to_skip(self, path: str) -> str | None:
        if self.mode == "fused":
            return "converting dequantizes as it reads"
        if load_config(Path(path)).quantization is None:
            return "it is not quantized"
        return None
