"""The stage `publish`: the checked checkpoint to where its users look for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import Asset, AssetAlias

from conversion_lib.publish.location import PublishedPath
from ferry_airflow.base import StageManifest, StageOperator, handed_on, path_in, picked
from ferry_airflow.execution.base import CommandResult, StageCommand
from ferry_airflow.links import browsable

if TYPE_CHECKING:
    from airflow.sdk import Context


class PublishOperator(StageOperator):
    """Publishes under `<destination>/<model>/<commit>/<target>/`, what readers look for last.

    A checkpoint without a passed check of its own is refused. Where the task has an AssetAlias among its outlets, the
    model's Asset is updated through it: its URI is `<destination>/<model>`, so that DAGs can be scheduled on a model,
    and its event's extra has `url`, `commit`, `target`, `verdict`, `max_kl` and `digest`.

    :param checkpoint: the manifest of `check`, or the path of a MaxText checkpoint (templated)
    :param destination: `gs://bucket/prefix` or the absolute path of a directory (templated)
    :param report_dir: directory of the check's report (templated); default: the one in the manifest of `check`
    :param execution: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `url` (of the published checkpoint), `destination`, `files`, `bytes`, `bytes_copied` (0
        where it was there and whole), `checked`, `digest`, and of the check `verdict` and `max_kl`
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

    def command(self) -> StageCommand:
        report_dir = self.report_dir or self._checked().get("report_dir")
        options = ["--report", report_dir] if report_dir else []
        return StageCommand(("publish", path_in(self.checkpoint), self.destination, *options))

    def manifest(self, result: CommandResult) -> StageManifest:
        self.link_target = str(result["url"])
        checked = self._checked()
        return {
            "destination": self.destination,
            **picked(result, "url", "files", "bytes", "bytes_copied", "checked", "digest"),
            **{key: checked[key] for key in ("verdict", "max_kl") if key in checked},
            **handed_on(self.checkpoint),
        }

    def after(self, context: Context, manifest: StageManifest) -> None:
        path = PublishedPath.parse(manifest["url"])
        root = path.model_url(manifest["url"])
        uri = root if "://" in root else browsable(root)
        extra = {key: manifest.get(key) for key in ("url", "verdict", "max_kl", "digest")}
        extra |= {"commit": path.commit, "target": path.target}
        for alias in self.outlets:
            if isinstance(alias, AssetAlias):
                self.log.info("Updating the asset %s of %s", uri, path.model)
                context["outlet_events"][alias].add(Asset(uri), extra=extra)

    def _checked(self) -> Mapping[str, Any]:
        """The manifest of the check; empty where the checkpoint is a path."""
        return {} if isinstance(self.checkpoint, str) else self.checkpoint
