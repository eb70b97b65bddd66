"""One input, converted by all who can, in turns: the floor, a plain copy, `ferry convert`, MaxText."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.final_form import FinalForm
from tests.benchmarks.inputs import Input, make
from tests.benchmarks.processes import Measured, measure, settle
from tests.benchmarks.results import Figure
from tests.support.paths import ROOT

HERE = Path(__file__).parent
FERRY = Path(sys.executable).with_name("ferry")
MAXTEXT_PYTHON = ROOT / ".parity" / "maxtext" / "bin" / "python"

GIB = 1 << 30
MIB = 1 << 20
DEFAULT_BUDGET = 2 * GIB
SMALL_BUDGET = 512 * MIB

FLOOR_TARGET = 1.2
MAXTEXT_TARGET = 3.5
SMALL_BUDGET_TARGET = 4 / 3
PEAK_ABOVE_BUDGET = GIB // 2


@dataclass(frozen=True)
class Contest:
    """Where an input is converted and how often. cold: without the page cache, which takes root."""

    wanted: Input
    work: Path
    rounds: int
    cold: bool

    @property
    def source(self) -> Path:
        return self.work / self.wanted.name

    @property
    def ours(self) -> Path:
        return self.work / "ferry"

    @property
    def theirs(self) -> Path:
        return self.work / "maxtext"

    def prepare(self) -> None:
        make(self.wanted, self.source)

    def _measure(self, command: list[object], output: Path) -> Measured:
        shutil.rmtree(output, ignore_errors=True)
        settle(self.source, cold=self.cold)
        return measure(command)

    def ferry(self, *options: str) -> Measured:
        """A whole `ferry convert`; `peak_bytes` is its own."""
        command = [FERRY, "convert", self.source, self.ours, "--json", "--quiet", "--skip-disk-check", *options]
        found = self._measure(command, self.ours)
        said = json.loads(found.output)
        assert not said["already"] and said["pieces_skipped"] == 0, "not the whole conversion was measured"
        return Measured(found.seconds, found.cpu_seconds, said["peak_bytes"], found.output)

    def maxtext(self) -> Measured:
        return self._measure([MAXTEXT_PYTHON, HERE / "maxtext_convert.py", self.source, self.theirs], self.theirs)

    def copy(self) -> Measured:
        """A plain copy of the source, synced."""
        copied = self.work / "copy"
        script = 'cp -r --reflink=never "$1" "$2" && sync "$2"/*'
        found = self._measure(["sh", "-c", script, "sh", self.source, copied], copied)
        shutil.rmtree(copied)
        return found

    def final_form(self, *options: str) -> FinalForm:
        """What the floor is to write; made of a conversion that is not measured."""
        self.ferry(*options)
        samples = self.work / "samples"
        shutil.rmtree(samples, ignore_errors=True)
        return FinalForm(self.ours, samples)

    def floor(self, form: FinalForm, threads: int) -> Measured:
        """The floor's process, less the time in which it loads the arrays that it has in their final form."""
        output, job = self.work / "floor", self.work / "samples" / "floor.json"
        files = [str(file) for file in sorted(self.source.glob("*.safetensors"))]
        job.write_text(json.dumps({"files": files, "arrays": form.arrays(output), "threads": threads}))
        found = self._measure([sys.executable, HERE / "floor.py", job], output)
        shutil.rmtree(output)
        loading = json.loads(found.output)
        return Measured(
            found.seconds - loading["seconds"],
            found.cpu_seconds - loading["cpu_seconds"],
            found.peak_bytes,
            found.output,
        )

    def fastest_floor(self, form: FinalForm) -> int:
        """The number of threads that the floor is fastest with, of several, each tried twice."""
        cores = os.cpu_count() or 1
        choices = sorted({cores, cores + 1, 2 * cores})
        return min(choices, key=lambda threads: min(self.floor(form, threads).seconds for _ in range(2)))


def convert_figures(contest: Contest, *, maxtext: bool) -> list[Figure]:
    """The default conversion, in turns with the floor, the small budget, a plain copy and MaxText."""
    form = contest.final_form()
    threads = contest.fastest_floor(form)
    turns: dict[str, Callable[[], Measured]] = {
        "floor": lambda: contest.floor(form, threads),
        "ferry": contest.ferry,
        "small": lambda: contest.ferry("--memory-budget", str(SMALL_BUDGET)),
        "copy": contest.copy,
    }
    if maxtext:
        turns["maxtext"] = contest.maxtext
    found = in_turns(turns, contest.rounds)
    floor, ferry = (_median(found[name]) for name in ("floor", "ferry"))
    figures = [
        Figure.median("plain copy of the source, synced", _seconds(found["copy"]), "s"),
        Figure("rate of the plain copy", contest.wanted.nbytes / _median(found["copy"]) / 1e9, "GB/s"),
        Figure.median(f"floor ({threads} threads)", _seconds(found["floor"]), "s"),
        Figure.median("floor, processor time", _cpu(found["floor"]), "s"),
        Figure.median("ferry convert", _seconds(found["ferry"]), "s"),
        Figure.median("ferry convert, processor time", _cpu(found["ferry"]), "s"),
        Figure("ferry / floor", ferry / floor, "x", at_most=FLOOR_TARGET),
        Figure("ferry / floor, processor time", ratio(_cpu(found["ferry"]), _cpu(found["floor"])), "x"),
        _peak("ferry convert, peak resident", found["ferry"], DEFAULT_BUDGET),
        Figure.median("ferry convert --memory-budget 512MiB", _seconds(found["small"]), "s"),
        Figure("512 MiB / default", _median(found["small"]) / ferry, "x", at_most=SMALL_BUDGET_TARGET),
        _peak("512 MiB, peak resident", found["small"], SMALL_BUDGET),
    ]
    if maxtext:
        figures += [
            Figure.median("MaxText 0.2.5, lazy, 16 devices", _seconds(found["maxtext"]), "s"),
            Figure("MaxText / ferry", _median(found["maxtext"]) / ferry, "x", at_least=MAXTEXT_TARGET),
            Figure("MaxText, peak resident", max(run.peak_bytes for run in found["maxtext"]) / MIB, "MiB"),
        ]
    return figures


def uncompressed_figures(contest: Contest) -> list[Figure]:
    """`--compression none` against a floor that compresses nothing either."""
    form = contest.final_form("--compression", "none")
    threads = contest.fastest_floor(form)
    found = in_turns(
        {
            "floor": lambda: contest.floor(form, threads),
            "ferry": lambda: contest.ferry("--compression", "none"),
        },
        contest.rounds,
    )
    return [
        Figure.median(f"floor ({threads} threads)", _seconds(found["floor"]), "s"),
        Figure.median("ferry convert --compression none", _seconds(found["ferry"]), "s"),
        Figure("ferry / floor", _median(found["ferry"]) / _median(found["floor"]), "x"),
        Figure("ferry / floor, processor time", ratio(_cpu(found["ferry"]), _cpu(found["floor"])), "x"),
        _peak("peak resident", found["ferry"], DEFAULT_BUDGET),
    ]


def in_turns(turns: dict[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Everyone once, then everyone again: what slows the machine down for a while slows all of them."""
    found: dict[str, list[Measured]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, run in turns.items():
            found[name].append(run())
            print(f"  {name}: {found[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    return found


def _seconds(runs: list[Measured]) -> list[float]:
    return [run.seconds for run in runs]


def _cpu(runs: list[Measured]) -> list[float]:
    return [run.cpu_seconds for run in runs]


def _median(runs: list[Measured]) -> float:
    return statistics.median(_seconds(runs))


def ratio(runs: list[float], others: list[float]) -> float:
    """Of the medians."""
    return statistics.median(runs) / statistics.median(others)


def _peak(name: str, runs: list[Measured], budget: int) -> Figure:
    largest = max(run.peak_bytes for run in runs) / MIB
    return Figure(name, largest, "MiB", at_most=(budget + PEAK_ABOVE_BUDGET) / MIB)
