"""`ferry demo`: the real DAG, in the real Airflow, on a small fp8 DeepSeek-V3 from a Hub on this machine.

Airflow runs as a subprocess with a home of its own: the library itself does not know Airflow. What the demo shows
comes from the manifests that the DAG's stages leave.
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

DAG_ID = "onboard_checkpoint"
REPO = "demo/tiny-deepseek-v3"
STAGES = ("resolve", "download", "dequantize", "convert", "finalize", "check", "publish")
MARKER = ".ferry-demo"
ENDING_SECONDS = 5.0
"""What Airflow gets to end in, where the demo is interrupted."""
POLL_SECONDS = 0.1
FINAL = (CheckFailed.exit_code, BadInput.exit_code)
"""Exit codes after which Airflow does not try a stage again."""


class StageFigures(BaseModel):
    """What a stage took. Bytes; seconds; `peak_bytes` is None where the stage ran inside Airflow's own process."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    stage: str
    seconds: float
    bytes_in: int
    bytes_out: int
    peak_bytes: int | None


class DemoResult(BaseModel):
    """What the demo did; `checkpoint` and `report` are paths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: list[StageFigures]
    max_kl: float
    checkpoint: str
    report: str
    seconds: float


def run_demo(work_dir: Path, reporter: Reporter) -> DemoResult:
    """Runs the demo in `work_dir`, which is made; what an earlier demo left there is removed first.

    Raises BadInput where Airflow or the check's packages are not installed, or where the directory holds something
    else; CheckFailed or OutsideFailure, naming the stage and the log, where the run fails.
    """
    _require_extras()
    started = time.monotonic()
    directory = _fresh(work_dir.absolute())
    airflow = _Airflow(directory)
    with airflow.command("db", "migrate") as migration:
        source = _make_checkpoint(directory / "source", reporter)
        reporter.say("Starting Airflow")
        if migration.wait():
            raise OutsideFailure(f"Airflow could not make its database; its log is {airflow.log}")
    manifests = _onboard(airflow, source, reporter)
    return DemoResult(
        stages=[StageFigures.model_validate(manifests[stage]) for stage in STAGES],
        max_kl=manifests["check"]["max_kl"],
        checkpoint=manifests["publish"]["url"],
        report=_published_report(manifests),
        seconds=round(time.monotonic() - started, 1),
    )


def summary(result: DemoResult) -> list[RenderableType]:
    """What a person sees at the end."""
    table = Table("stage", title=f"{DAG_ID}: {REPO}", title_justify="left")
    for heading in ("time", "bytes in", "bytes out", "peak memory"):
        table.add_column(heading, justify="right")
    for stage in result.stages:
        table.add_row(stage.stage, *_cells(stage))
    lines = (
        f"Largest KL of a token, against transformers: {result.max_kl:.2e}",
        f"Checkpoint: {_shown(result.checkpoint)}",
        f"Report:     {_shown(result.report)}",
        f"All in {result.seconds:.0f} s",
    )
    return [table, *(Text(line, overflow="fold") for line in lines)]


def _shown(path: str) -> str:
    """As short as it can be and still be opened from here."""
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
            raise BadInput(f"{directory} is not empty and was not made by a demo; give it a directory of its own")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()
    return directory


def _make_checkpoint(destination: Path, reporter: Reporter) -> Path:
    from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3

    path = make_tiny_deepseek_v3(destination)
    size = sum(file.stat().st_size for file in path.iterdir())
    reporter.say(f"Made a DeepSeek-V3 of {format_bytes(size)} in fp8: {path}")
    return path


class _Airflow:
    """Airflow in `directory`: its own home, an embedded database, and the DAGs that were installed with Ferry."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "airflow.log"
        self.work_dir = directory / "work"
        self.published = directory / "published"
        self._environment = {
            # nothing of another Airflow, another Hub, or another Ferry
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
        """`airflow <arguments>`, writing to the log; it does not outlive the block."""
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
        """What the stages of the run have left so far, by stage; the conversion has one part, the part 0."""
        paths = (self.work_dir / "runs").glob("*/*.json")
        return {path.stem.removesuffix("-0"): json.loads(path.read_bytes()) for path in paths}


def _dags_folder() -> Path:
    """The DAGs of `ferry_airflow`, which is looked for and not imported: the library knows nothing of Airflow."""
    spec = find_spec("ferry_airflow")
    if spec is None or spec.origin is None:
        raise BadInput("the DAGs of ferry are not installed beside it: pip install 'ferry-checkpoints[airflow,check]'")
    return Path(spec.origin).parent / "dags"


def _onboard(airflow: _Airflow, source: Path, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Runs the DAG against a Hub of its own; returns the stages' manifests."""
    from conversion_lib.demo.local_hub import LocalHub

    conf = json.dumps({"repo": REPO, "destination": str(airflow.published)})
    with (
        LocalHub({REPO: source}) as hub,
        airflow.command("dags", "test", DAG_ID, "--conf", conf, HF_ENDPOINT=hub.endpoint) as run,
    ):
        reporter.say(f"Running the DAG {DAG_ID}; its log is {airflow.log}")
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
    """A line for each stage that has ended, well or not, since the last time."""
    for stage in STAGES:
        manifest = manifests.get(stage)
        if manifest is None or manifest == told.get(stage):
            continue
        if "error" in manifest:
            again = "" if manifest["exit_code"] in FINAL else " (Airflow tries it again)"
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
            raise kind(f"the demo failed in its stage {stage}: {_error_of(manifest)} (log: {log})")
    if exit_code or not set(STAGES) <= set(manifests):
        raise OutsideFailure(f"the demo's DAG did not succeed; its log is {log}")


def _published_report(manifests: dict[str, dict[str, Any]]) -> str:
    """The report lies beside the published checkpoint under the name that the check gave it."""
    check = manifests["check"]
    page = Path(check["report"]).relative_to(Path(check["report_dir"]).parent)
    return str(Path(manifests["publish"]["url"]) / page)


def _error_of(manifest: dict[str, Any]) -> str:
    return str(manifest["error"]).removeprefix("ferry: ")
