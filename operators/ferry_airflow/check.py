"""The stage `check`: compares the logits of the converted weights with the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from conversion_lib.record import MAX_MODEL_KL, REPORT_DIR_NAME
from ferry_airflow.base import StageManifest, StageOperator, handed_on, path_in, picked
from ferry_airflow.execution.base import CommandResult, StageCommand
from ferry_airflow.layout import run_report

FIGURES = (
    *("verdict", "weights", "model", "max_kl", "mean_kl", "max_abs_diff", "top1", "top10"),
    *("digest", "report", "already"),
)


class CheckOperator(StageOperator):
    """Compares logits, of weights and of functions.

    If the logits differ by more than `max_kl`, or MaxText's function is further from the original's than
    `max_model_kl`, the task fails and is not retried.

    :param checkpoint: the manifest of `finalize`, or the path of a MaxText checkpoint (templated)
    :param reference: the manifest of `dequantize`, or the path of the Hugging Face checkpoint to compare
        with (templated)
    :param max_kl: largest Kullback-Leibler divergence allowed for any token, in nats, float32 logits on both
        sides (templated). If given, it alone decides. Default None: as `ferry check`, 1e-5, or more if the conversion
        rounds or the model has delta nets
    :param max_model_kl: how far MaxText's function may be from the original's on the same weights: the largest
        Kullback-Leibler divergence of a token, in nats (templated); default 1e-3
    :param report_dir: directory for the report (templated); default None: `report` in the checkpoint's directory
    :param destination: where the run publishes, `gs://bucket/prefix` or an absolute directory: the check leaves its
        report there until then, so that the run's page shows it (templated); default None: it is shown once published
    :param execution: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `verdict`, its parts `weights` (pass or fail) and `model` (`verdict`, `max_kl`, `threshold`,
        how it `differs` in words, the `settings` that a MaxText run passes), `max_kl` and `mean_kl` (nats),
        `max_abs_diff` (of logits), `top1` and `top10` (share of tokens that agree, 0 to 1), `digest` (of the checkpoint
        that the verdict is for), `report_dir`, `report` (the page in it) and `already` (an earlier check of the same
        files passed)
    """

    stage: ClassVar[str] = "check"
    template_fields: Sequence[str] = ("checkpoint", "reference", "max_kl", "max_model_kl", "report_dir", "destination")

    def __init__(
        self,
        *,
        checkpoint: str | Mapping[str, Any],
        reference: str | Mapping[str, Any],
        max_kl: float | None = None,
        max_model_kl: float = MAX_MODEL_KL,
        report_dir: str | None = None,
        destination: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.checkpoint = checkpoint
        self.reference = reference
        self.max_kl = max_kl
        self.max_model_kl = max_model_kl
        self.report_dir = report_dir
        self.destination = destination

    def command(self) -> StageCommand:
        path = path_in(self.checkpoint)
        self.link_target = self._report_dir()  # set before the check, for one that fails
        options = ["--reference", path_in(self.reference), "--report", self.link_target]
        if self.max_kl is not None:
            options += ["--max-kl", str(self.max_kl)]
        options += ["--max-model-kl", str(self.max_model_kl)]
        if self.destination:
            options += ["--run-report", run_report(self.destination, self.dag_id, self.run_id)]
        return StageCommand(("check", path, *options), StageCommand.REDO)

    def inputs(self) -> list[object]:
        return [self.checkpoint, self.reference]

    def manifest(self, result: CommandResult) -> StageManifest:
        self.link_target = str(result["report"])
        paths = {"path": path_in(self.checkpoint), "report_dir": self._report_dir()}
        return {**paths, **picked(result, *FIGURES), **handed_on(self.checkpoint)}

    def _report_dir(self) -> str:
        return self.report_dir or str(Path(path_in(self.checkpoint)) / REPORT_DIR_NAME)
