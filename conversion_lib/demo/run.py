"""`ferry demo`: the real DAG in the real Airflow, on a small fp8 DeepSeek-V3 from a local Hub.

Airflow runs as a subprocess with its own home, because the library does not import Airflow. The demo shows what the
DAG's stages write to their manifests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from conversion_lib.core.child import Child
from conversion_lib.errors import BadInput, CheckFailed, OutsideFailure
from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.storage.locations import local_path

DAG_ID = "onboard_checkpoint"
REPO = "demo/tiny-deepseek-v3"
STAGES = ("resolve", "download", "dequantize", "convert", "finalize", "check", "publish")
MARKER = ".ferry-demo"
"""File that marks a directory as made by a demo."""
ENDING_SECONDS = 5.0
"""Time for Airflow to exit when the demo is interrupted."""
POLL_SECONDS = 0.1
FINAL = (CheckFailed.exit_code, BadInput.exit_code)
"""Exit codes after which Airflow does not retry a stage."""


class StageFigures(BaseModel):
    """What one stage took, from its manifest.

    Attributes:
        seconds: Duration.
        bytes_in: Bytes read.
        bytes_out: Bytes written.
        peak_bytes: Peak resident bytes. None: the stage ran in Airflow's own process.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    stage: str
    seconds: float
    bytes_in: int
    bytes_out: int
    peak_bytes: int | None


class DemoResult(BaseModel):
    """The result of the demo.

    Attributes:
        max_kl: The largest KL divergence of a token in the logit check, in nats.
        checkpoint: Path of the published checkpoint.
        report: Path of the check's HTML report.
        seconds: Duration of the whole demo.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: list[StageFigures]
    max_kl: float
    checkpoint: str
    report: str
    seconds: float


def run_demo(work_dir: Path, reporter: Reporter) -> DemoResult:
    """Runs the demo.

    Args:
        work_dir: Created if missing. What an earlier demo left there is removed first.
        reporter: Shows messages.

    Raises:
        BadInput: Airflow or the check's packages are not installed, or the directory holds something else.
        CheckFailed: The logit check failed.
        OutsideFailure: Another stage failed, or Airflow itself. The message names the stage and the log.
    """
    _require_extras()
    started = time.monotonic()
    directory = _fresh(local_path(work_dir, "a directory, for --work-dir").absolute())
    airflow = _Airflow(directory)
    with airflow.command("db", "migrate") as migration:
        source = _make_checkpoint(directory / "source", reporter)
        reporter.say("Starting Airflow")
        if migration.wait():
            raise OutsideFailure(f"Airflow could not create its database (log: {airflow.log})")
    manifests = _onboard(airflow, source, reporter)
    return DemoResult(
        stages=[StageFigures.model_validate(manifests[stage]) for stage in STAGES],
        max_kl=manifests["check"]["max_kl"],
        checkpoint=manifests["publish"]["url"],
        report=_published_report(manifests),
        seconds=round(time.monotonic() - started, 1),
    )


def summary(result: DemoResult) -> list[RenderableType]:
    """Returns what the command prints at the end: a table of the stages, and lines with the results."""
    table = Table("stage", title=f"{DAG_ID}: {REPO}", title_justify="left")
    for heading in ("time", "bytes in", "bytes out", "peak memory"):
        table.add_column(heading, justify="right")
    for stage in result.stages:
        table.add_row(stage.stage, *_cells(stage))
    lines = (
        f"Largest KL of a token, against transformers: {result.max_kl:.2e}",
        f"Checkpoint: {_shown(result.checkpoint)}",
        f"Report:     {_shown(result.report)}",
        f"Total time: {result.seconds:.0f} s",
    )
    return [table, *(Text(line, overflow="fold") for line in lines)]


def _shown(path: str) -> str:
    """The path relative to the working directory if it is below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _cells(stage: StageFigures) -> tuple[str, str, str, str]:
    peak = "–" if stage.peak_bytes is None else format_bytes(stage.peak_bytes)
    return f"{stage.seconds:.1f} s", format_bytes(stage.bytes_in), format_bytes(stage.bytes_out), peak


def _require_extras() -> None:
    missing = [name for name in ("airflow", "jax", "torch", "transformers") if find_spec(name) is None]
    if missing:
        raise BadInput(f"the demo needs {', '.join(missing)}: pip install 'ferry-checkpoints[airflow,check]'")


def _fresh(directory: Path) -> Path:
    """Empties the directory, if a demo made it; refuses one with anything else in it."""
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / MARKER).exists():
            raise BadInput(f"{directory} is not empty and was not made by a demo: use another directory")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()
    return directory


def _make_checkpoint(destination: Path, reporter: Reporter) -> Path:
    from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3

    path = make_tiny_deepseek_v3(destination)
    size = sum(file.stat().st_size for file in path.iterdir())
    reporter.say(f"Made an fp8 DeepSeek-V3 of {format_bytes(size)}: {path}")
    return path


class _Airflow:
    """Airflow in `directory`, with its own home, an embedded database, and the DAGs installed with Ferry."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "airflow.log"
        self.work_dir = directory / "work"
        self.published = directory / "published"
        self._environment = {
            # no settings of another Airflow, Hub or Ferry
            **{name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "FERRY_", "HF_"))},
            "AIRFLOW_HOME": str(directory / "airflow"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(_dags_folder()),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
            "FERRY_WORK_DIR": str(self.work_dir),
            "HF_HOME": str(directory / "hf-home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @contextmanager
    def command(self, *arguments: str, **environment: str) -> Iterator[Child]:
        """Runs `airflow <arguments>`, with its output in the log; it is ended with the block."""
        with (
            self.log.open("ab") as log,
            Child(
                [sys.executable, "-m", "airflow", *arguments],
                grace_seconds=ENDING_SECONDS,
                env={**self._environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            yield process

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Reads the manifests written so far, by stage. The conversion has a single part, part 0."""
        paths = (self.work_dir / "runs").glob("*/*.json")
        return {path.stem.removesuffix("-0"): json.loads(path.read_bytes()) for path in paths}


def _dags_folder() -> Path:
    """The DAGs of `ferry_airflow`, found without importing it, because the library does not import Airflow."""
    spec = find_spec("ferry_airflow")
    if spec is None or spec.origin is None:
        raise BadInput("ferry's DAGs are not installed: pip install 'ferry-checkpoints[airflow,check]'")
    return Path(spec.origin).parent / "dags"


def _onboard(airflow: _Airflow, source: Path, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Runs the DAG against its own local Hub; returns the stages' manifests."""
    from conversion_lib.demo.local_hub import LocalHub

    conf = json.dumps({"repo": REPO, "destination": str(airflow.published)})
    with (
        LocalHub({REPO: source}) as hub,
        airflow.command("dags", "test", DAG_ID, "--conf", conf, HF_ENDPOINT=hub.endpoint) as run,
    ):
        reporter.say(f"Running the DAG {DAG_ID} (log: {airflow.log})")
        told: dict[str, dict[str, Any]] = {}
        code = None
        while code is None:
            code = run.poll()
            told = _tell_news(airflow.manifests(), told, reporter)
            time.sleep(POLL_SECONDS)
    _require_success(code, told, airflow.log)
    return told


def _tell_news(
    manifests: dict[str, dict[str, Any]], told: dict[str, dict[str, Any]], reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Reports each stage that has succeeded or failed since the last call."""
    for stage in STAGES:
        manifest = manifests.get(stage)
        if manifest is None or manifest == told.get(stage):
            continue
        if "error" in manifest:
            again = "" if manifest["exit_code"] in FINAL else " (Airflow retries it)"
            reporter.say(f"✗ {stage:<11} {_error_of(manifest)}{again}")
        else:
            seconds, bytes_in, bytes_out, peak = _cells(StageFigures.model_validate(manifest))
            reporter.say(f"✓ {stage:<11} {seconds:>7}  {bytes_in:>8} in  {bytes_out:>8} out  {peak:>8} peak")
    return manifests


def _require_success(exit_code: int, manifests: dict[str, dict[str, Any]], log: Path) -> None:
    for stage in STAGES:
        manifest = manifests.get(stage, {})
        if "error" in manifest:
            kind = CheckFailed if manifest["exit_code"] == CheckFailed.exit_code else OutsideFailure
            raise kind(f"the demo failed in stage {stage}: {_error_of(manifest)} (log: {log})")
    if exit_code or not set(STAGES) <= set(manifests):
        raise OutsideFailure(f"the demo's DAG did not succeed (log: {log})")


def _published_report(manifests: dict[str, dict[str, Any]]) -> str:
    """The report's path: the publish stage copies it to the published checkpoint."""
    check = manifests["check"]
    page = Path(check["report"]).relative_to(Path(check["report_dir"]).parent)
    return str(Path(manifests["publish"]["url"]) / page)


def _error_of(manifest: dict[str, Any]) -> str:
    return str(manifest["error"]).removeprefix("ferry: ")
