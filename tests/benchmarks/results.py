"""What a benchmark found: figures against their targets, as a table and as a line of results.jsonl."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support.paths import ROOT

RESULTS = Path(__file__).with_name("results.jsonl")
PACKAGES = ("ferry-checkpoints", "tensorstore", "numpy", "orbax-checkpoint", "jax")


@dataclass(frozen=True)
class Figure:
    """One figure in `unit` (s, MiB, GB/s, a plain ratio `x`, or a count), and the target where the issue sets one.

    runs: what was measured round by round, where `value` is their median.
    """

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    runs: tuple[float, ...] = ()

    @staticmethod
    def median(name: str, runs: list[float], unit: str, **target: float) -> Figure:
        return Figure(name, statistics.median(runs), unit, runs=tuple(runs), **target)

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        if self.at_most is None and self.at_least is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def target(self) -> str:
        bounds = [("≤", self.at_most), ("≥", self.at_least)]
        return " and ".join(f"{sign} {show(bound, self.unit)}" for sign, bound in bounds if bound is not None)

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name, "value": round(self.value, 4), "unit": self.unit}
        if self.target:
            data |= {"target": self.target, "met": self.met}
        if self.runs:
            data["runs"] = [round(run, 3) for run in self.runs]
        return data


@dataclass
class Results:
    """The figures of one run of a benchmark by their section, and remarks such as what was left out and why."""

    benchmark: str
    settings: dict[str, Any]
    sections: dict[str, list[Figure]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, section: str, figures: list[Figure]) -> None:
        self.sections[section] = figures

    def print(self, console: Console) -> None:
        for section, figures in self.sections.items():
            table = Table(title=section, title_justify="left")
            for heading in ("figure", "measured", "target", "met", "runs"):
                table.add_column(heading, justify="right" if heading == "measured" else "left")
            for figure in figures:
                met = {None: "", True: "yes", False: "NO"}[figure.met]
                runs = ", ".join(show(run, figure.unit) for run in figure.runs)
                table.add_row(figure.name, show(figure.value, figure.unit), figure.target, met, runs)
            console.print(table, highlight=False)
        for remark in self.remarks:
            console.print(remark, highlight=False)

    def append(self, path: Path) -> None:
        """One more line in `path`: date, machine, versions, settings, figures and remarks."""
        line = {
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "machine": machine(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "settings": self.settings,
            "figures": {section: [figure.as_json() for figure in found] for section, found in self.sections.items()},
            "remarks": self.remarks,
        }
        with path.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def show(value: float, unit: str) -> str:
    if unit == "count":
        return f"{value:,.0f}"
    return f"{value:.2f} {unit}" if unit != "MiB" else f"{value:.0f} {unit}"


def machine() -> dict[str, Any]:
    """Cores, processor, memory and Python: what figures depend on, and nothing that tells whose machine it is."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "processor": model,
        "memory_gib": round(memory / (1 << 30), 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _commit() -> str:
    """The commit that was measured, with `+changes` where the tree differs from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + ("+changes" if changes.stdout.strip() else "")
