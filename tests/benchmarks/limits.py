"""What should not grow with the model: memory with its layers, start-up with its tensors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.benchmarks.contest import FERRY, MIB, Contest
from tests.benchmarks.inputs import Input, bf16_input, full_size_deepseek
from tests.benchmarks.processes import measure
from tests.benchmarks.results import Figure

BUDGETS = ("512MiB", "2GiB")
LAYERS, FEW_LAYERS = 12, 3
"""Of the smaller model. It fills a run's buffers some ten times in the larger budget. A peak is the largest of many
moments: with fewer of them, those of FEW_LAYERS, it stays somewhat below what a run comes to in the end."""
TIMES_LAYERS = 4
MEMORY_TARGET = 1.1
START_TARGET = 2.0
PLAN_TARGET = 10.0
FIRST_READ = 16 * MIB
"""So much more than planning reads has been read by then: well under a tenth of a second's reading."""


def memory_figures(work: Path, rounds: int, *, tiny: bool) -> list[Figure]:
    """The peak of a model and of one with four times its layers, at two budgets; and of a small one."""
    figures = []
    for budget in BUDGETS:
        peaks = [
            _peak_of(bf16_input(tiny, layers=count), budget, work, rounds)
            for count in (FEW_LAYERS, LAYERS, LAYERS * TIMES_LAYERS)
        ]
        (small, small_gb), (few, few_gb), (many, many_gb) = peaks
        figures += [
            Figure(f"{budget}: peak, {FEW_LAYERS} layers ({small_gb:.1f} GB)", small, "MiB"),
            Figure(f"{budget}: peak, {LAYERS} layers ({few_gb:.1f} GB)", few, "MiB"),
            Figure(f"{budget}: peak, {TIMES_LAYERS} x the layers ({many_gb:.1f} GB)", many, "MiB"),
            Figure(f"{budget}: {TIMES_LAYERS} x the layers / once", many / few, "x", at_most=MEMORY_TARGET),
        ]
    return figures


def _peak_of(model: Input, budget: str, work: Path, rounds: int) -> tuple[float, float]:
    """The largest peak of some conversions in MiB, and the model's size in GB."""
    contest = Contest(model, work, rounds, cold=False)
    contest.prepare()
    peak = max(contest.ferry("--memory-budget", budget).peak_bytes for _ in range(rounds))
    return peak / MIB, model.nbytes / 1e9


def startup_figures(work: Path, rounds: int) -> list[Figure]:
    """`ferry plan`, and the time to the first byte read, for DeepSeek-V3's index at its true size."""
    source, output = full_size_deepseek(work), work / "ferry"
    index = json.loads((source / "model.safetensors.index.json").read_bytes())
    plan = [FERRY, "plan", source, "--json"]
    plans = [measure(plan).seconds for _ in range(rounds)]
    headers = _bytes_read_by(plan)
    starts = []
    for _ in range(rounds):
        shutil.rmtree(output, ignore_errors=True)
        starts.append(
            _seconds_until_read(
                [FERRY, "convert", source, output, "--quiet", "--skip-disk-check"], headers + FIRST_READ
            )
        )
    shutil.rmtree(output, ignore_errors=True)
    return [
        Figure("tensors in the index", len(index["weight_map"]), "count"),
        Figure.median("ferry plan", plans, "s", at_most=PLAN_TARGET),
        Figure.median("ferry convert, to the first byte read", starts, "s", at_most=START_TARGET),
    ]


def _bytes_read_by(command: list[object]) -> int:
    """All that a process reads by system calls, its own modules included."""
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    # ended but not yet waited for: the kernel still tells what it read
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    count = bytes_read(process.pid)
    if process.wait():
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return count


def _seconds_until_read(command: list[object], nbytes: int) -> float:
    """Starts a process, and ends it when it has read `nbytes`."""
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE)
    try:
        while process.poll() is None:
            if bytes_read(process.pid) >= nbytes:
                return time.perf_counter() - started
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    raise RuntimeError(f"{command} ended with {process.returncode} before it read: {errors.decode()[-500:]}")


def bytes_read(pid: int) -> int:
    """What the process has read by system calls so far, from disk or cache."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])
