"""The stage `publish`: the checked checkpoint to where its users look for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from operators.base import Manifest, StageOperator, handed_on, path_in, picked


class PublishOperator(StageOperator):
    """Publishes under `<destination>/<model>/<commit>/<target>/`, what readers look for last.

    A checkpoint without a passed check of its own is refused.

    :param checkpoint: the manifest of `check` or `convert`, or the path of a MaxText checkpoint (templated)
    :param destination: `gs://bucket/prefix` or the absolute path of a directory (templated)
    :param report_dir: directory of the check's report (templated); default: the one in the manifest of `check`
    :param place: as in StageOperator
    :returns: manifest with `url` (of the published checkpoint), `files`, `bytes`, `bytes_copied` (0 where it was
        there and whole), `checked` and `digest`
    """

    stage: ClassVar[str] = "publish"
    template_fields: Sequence[str] = ("checkpoint", "destination", "report_dir")

    def __init__(
        self,
        *,
        checkpoint: str | Mapping[str, Any],
        destination: str,
        report_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.checkpoint = checkpoint
        self.destination = destination
        self.report_dir = report_dir

    def work(self) -> Manifest:
        in_manifest = None if isinstance(self.checkpoint, str) else self.checkpoint.get("report_dir")
        report_dir = self.report_dir or in_manifest
        options = ["--report", report_dir] if report_dir else []
        result = self.ferry("publish", path_in(self.checkpoint), self.destination, *options)
        self.link_target = str(result["url"])
        return {
            **picked(result, "url", "files", "bytes", "bytes_copied", "checked", "digest"),
            **handed_on(self.checkpoint),
        }
