"""`make bench-full`: DeepSeek-V3 at its true names, shapes and dtypes, sparse files of zeros, through `ferry convert`.

    python -m tests.benchmarks.full [--tiny]

Zeros compress to nothing: this shows memory and the processor's share at full size, and whether it slows down as it
goes, not the disk. The rate is taken from the journal, which tells what is durable.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tensorstore as ts
import typer
from rich.console import Console

from conversion_lib.core.dtypes import itemsize
from conversion_lib.storage.local import LocalLocation
from tests.benchmarks.bench import WORK
from tests.benchmarks.contest import DEFAULT_BUDGET, FERRY, MIB, PEAK_ABOVE_BUDGET
from tests.benchmarks.inputs import TINY_DEEPSEEK_V3, full_size_deepseek, make_sparse
from tests.benchmarks.results import RESULTS, Figure, Results

FIRST_BYTES = 20_000_000_000
"""The rate over the first so many bytes of output predicts the time of the whole."""
PREDICTION_TARGET = 1.2
SECONDS_AIMED_AT = 25 * 60

TINY_CONFIG = TINY_DEEPSEEK_V3 | {"n_routed_experts": 128}
TINY_FIRST_BYTES = 20_000_000
TINY_BUDGET = "64MiB"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
JsonObject = dict[str, Any]


@app.command()
def main(
    tiny: Annotated[bool, typer.Option(help="A small model: to see that it runs; its figures mean nothing.")] = False,
    work: Annotated[Path, typer.Option(help="Where the sparse files are and the output goes.")] = WORK,
    results: Annotated[Path, typer.Option(help="The file that a line is appended to.")] = RESULTS,
) -> None:
    """Converts 671 B parameters of zeros, and appends a line to the results file."""
    work = work.absolute()
    source = make_sparse(TINY_CONFIG, work / "tiny-sparse", 4) if tiny else full_size_deepseek(work)
    output = work / "full"
    shutil.rmtree(output, ignore_errors=True)
    planned = subprocess.run([FERRY, "plan", source, "--json"], capture_output=True, check=True)
    plan = json.loads(planned.stdout)
    command = [FERRY, "convert", source, output, "--json", "--quiet", "--skip-disk-check"]
    # a small budget makes small groups, so that there is something to watch
    run = watch([*command, *(["--memory-budget", TINY_BUDGET] if tiny else [])], output, plan, 0.01 if tiny else 0.25)
    found = Results("bench-full", {"tiny": tiny})
    found.add(
        f"{plan['model']}, zeros: {plan['bytes_in'] / 1e9:,.1f} GB in, {plan['bytes_out'] / 1e9:,.1f} GB out",
        figures(run, plan, output, TINY_FIRST_BYTES if tiny else FIRST_BYTES),
    )
    found.remarks.append("zeros compress to nothing: memory and the processor's share, not the disk's")
    shutil.rmtree(output)
    found.print(Console(width=120))
    found.append(results)


@dataclass(frozen=True)
class Watched:
    """A conversion that ran to its end. samples: (seconds since its start, bytes of output durable by then)."""

    seconds: float
    samples: list[tuple[float, int]]
    result: JsonObject


def watch(command: list[object], output: Path, plan: JsonObject, interval: float) -> Watched:
    """Runs a conversion and reads its journal every `interval` seconds. Raises RuntimeError where it fails."""
    journals = Journals(output / ".ferry", plan)
    samples: list[tuple[float, int]] = []
    started = told = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while process.poll() is None:
            time.sleep(interval)
            now, done = time.monotonic(), journals.bytes_done()
            if done > (samples[-1][1] if samples else 0):
                samples.append((now - started, done))
            if now - told >= 30:
                told = now
                print(f"  {now - started:.0f} s: {done / 1e9:.1f} GB", file=sys.stderr, flush=True)
    finally:
        process.kill()
        said, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"ferry convert ended with {process.returncode}: {errors.decode()[-2000:]}")
    return Watched(time.monotonic() - started, samples, json.loads(said))


class Journals:
    """The journals in a work directory, read on from where they were. journal.py says what a line of them is."""

    def __init__(self, directory: Path, plan: JsonObject) -> None:
        self._directory = directory
        self._widths = {array["path"]: itemsize(array["dtype"]) for array in plan["arrays"]}
        self._ends: dict[Path, int] = {}
        self._done = 0

    def bytes_done(self) -> int:
        # where the run is just being committed, they are about to be removed
        with suppress(FileNotFoundError):
            for path in self._directory.glob("journal*.jsonl"):
                self._read_on(path)
        return self._done

    def _read_on(self, path: Path) -> None:
        start = self._ends.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                break  # it is being written
            for array, box in json.loads(line)["pieces"]:
                self._done += math.prod(stop - begin for begin, stop in box) * self._widths[array]
            start += len(line)
        self._ends[path] = start


def figures(run: Watched, plan: JsonObject, output: Path, first_bytes: int) -> list[Figure]:
    begun, first, last = run.samples[0], _first_beyond(run.samples, first_bytes), run.samples[-1]
    first_rate = _rate(begun, first)
    predicted = plan["bytes_out"] / first_rate
    expected = sum(
        math.prod(-(-extent // step) for extent, step in zip(array["shape"], array["chunk_shape"], strict=True))
        for array in plan["arrays"]
    )
    on_disk = sum(path.stat().st_blocks * 512 for path in output.rglob("*") if path.is_file())
    return [
        Figure("ferry convert", run.seconds, "s", at_most=SECONDS_AIMED_AT),
        Figure("of that, until the first group was durable", begun[0], "s"),
        Figure(f"rate over the first {first_bytes / 1e9:.0f} GB", first_rate / 1e9, "GB/s"),
        Figure("rate over the rest", _rate(first, last) / 1e9, "GB/s"),
        Figure("rate over all, start-up and commit included", plan["bytes_out"] / run.seconds / 1e9, "GB/s"),
        Figure("time that the first rate predicts", predicted, "s"),
        Figure("time / predicted", run.seconds / predicted, "x", at_most=PREDICTION_TARGET),
        Figure(
            "peak resident", run.result["peak_bytes"] / MIB, "MiB", at_most=(DEFAULT_BUDGET + PEAK_ABOVE_BUDGET) / MIB
        ),
        Figure("chunks stored", stored_chunks(output, plan), "count", at_least=expected, at_most=expected),
        Figure("output on disk", on_disk / MIB, "MiB"),
    ]


def _first_beyond(samples: list[tuple[float, int]], nbytes: int) -> tuple[float, int]:
    """The first sample by which `nbytes` were durable; one before it and one after it are needed for rates."""
    found = next((sample for sample in samples[1:-1] if sample[1] >= nbytes), None)
    if found is None:
        raise RuntimeError(f"too few groups were seen to take a rate over the first {nbytes} bytes: {samples}")
    return found


def _rate(since: tuple[float, int], until: tuple[float, int]) -> float:
    """Bytes per second."""
    return (until[1] - since[1]) / (until[0] - since[0])


def stored_chunks(output: Path, plan: JsonObject) -> int:
    """How many chunks of the plan's arrays the OCDBT store at `output` has keys for."""
    base = LocalLocation(output / "0" / "items").spec
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    names = {array["path"].replace("/", ".").encode() for array in plan["arrays"]}
    keys = (key.partition(b"/") for key in store.list().result())
    return sum(name in names and key != b"zarr.json" for name, _, key in keys)


if __name__ == "__main__":
    app()
