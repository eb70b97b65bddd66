"""The stage `publish`: copies the checked checkpoint to its destination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import Asset, AssetAlias

from conversion_lib.publish.location import PublishedPath
from ferry_airflow.base import StageManifest, StageOperator, handed_on, path_in, picked
from ferry_airflow.execution.base import CommandResult, StageCommand
from ferry_airflow.layout import run_report
from ferry_airflow.links import browsable

if TYPE_CHECKING:
    from airflow.sdk import Context


class PublishOperator(StageOperator):
    """Publishes to `<destination>/<model>/<commit>/<target>/`. The marker that readers look for is written last.

    A checkpoint without a passed check is refused. If the task has an AssetAlias among its outlets, it updates the
    model's Asset through the alias. The Asset's URI is `<destination>/<model>`, so a DAG can be scheduled on a model.
    The event's extra has `url`, `commit`, `target`, `verdict`, `max_kl`, `model` and `digest`.

    :param checkpoint: the manifest of `check`, or the path of a MaxText checkpoint (templated)
    :param destination: `gs://bucket/prefix` or the absolute path of a directory (templated)
    :param report_dir: directory of the check's report (templated); default None: the one in the manifest of `check`
    :param execution: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `url` (of the published checkpoint), `destination`, `files` (how many), `bytes`,
        `bytes_copied` (0 if it was already complete), `checked`, `digest`, and the check's `verdict`, `max_kl` and
        `model`
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
        options += ["--run-report", run_report(self.destination, self.dag_id, self.run_id)]
        return StageCommand(("publish", path_in(self.checkpoint), self.destination, *options), StageCommand.REDO)

    def inputs(self) -> list[object]:
        return [self.checkpoint]

    def manifest(self, result: CommandResult) -> StageManifest:
        self.link_target = str(result["url"])
        checked = self._checked()
        return {
            "destination": self.destination,
            **picked(result, "url", "files", "bytes", "bytes_copied", "checked", "digest"),
            **{key: checked[key] for key in ("verdict", "max_kl", "model") if key in checked},
            **handed_on(self.checkpoint),
        }

    def after(self, context: Context, manifest: StageManifest) -> None:
        path = PublishedPath.parse(manifest["url"])
        root = path.model_url(manifest["url"])
        uri = root if "://" in root else browsable(root)
        extra = {key: manifest.get(key) for key in ("url", "verdict", "max_kl", "model", "digest")}
        extra |= {"commit": path.commit, "target": path.target}
        for alias in self.outlets:
            if isinstance(alias, AssetAlias):
                self.log.info("Updating the asset %s of %s", uri, path.model)
                context["outlet_events"][alias].add(Asset(uri), extra=extra)

    def _checked(self) -> Mapping[str, Any]:
        """The manifest of the check; empty if the checkpoint is a path."""
        return {} if isinstance(self.checkpoint, str) else self.checkpoint
