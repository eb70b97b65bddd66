"""The benchmarks run from end to end, on small inputs: what they time here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conversion_lib.sources.safetensors import SafetensorsSource
from tests.benchmarks.fetched import Fetched, maxtext_chunk
from tests.benchmarks.full import Watched, figures
from tests.benchmarks.inputs import MADE_NAME, WEIGHT_SCALE, bf16_input, fp8_input, make
from tests.benchmarks.results import Figure
from tests.support.paths import ROOT


def run_benchmark(module: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    """The line that a benchmark appends to the results."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", "--tiny", "--work", tmp_path, "--results", results]
    done = subprocess.run([*map(str, command), *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = results.read_text().splitlines()
    assert str(tmp_path) not in line
    return json.loads(line)


def test_bench_compares_ferry_with_the_floor(tmp_path):
    line = run_benchmark("bench", tmp_path, "--rounds", "1", "--only", "fp8", "--only", "memory")
    assert line["settings"] == {"sections": ["fp8", "memory"], "rounds": 1, "tiny": True, "cache": "warm"}
    assert line["machine"]["cores"] and line["versions"]["tensorstore"]
    contest, memory = ({figure["name"]: figure for figure in figures} for figures in line["figures"].values())
    ratio = contest["ferry / floor"]
    floor = next(figure for name, figure in contest.items() if name.startswith("floor ("))
    assert ratio["value"] == pytest.approx(contest["ferry convert"]["value"] / floor["value"], rel=0.01)
    assert ratio["met"] == (ratio["value"] <= 1.2)
    assert {name for name, figure in memory.items() if "met" in figure} == {
        "512MiB: 4 x the layers / once",
        "2GiB: 4 x the layers / once",
    }
    assert any("left out for fp8" in remark for remark in line["remarks"])


def test_the_full_size_benchmark_counts_every_chunk(tmp_path):
    (found,) = run_benchmark("full", tmp_path)["figures"].values()
    values = {figure["name"]: figure for figure in found}
    assert values["chunks stored"]["met"]
    assert values["rate over the rest"]["value"] > 0


def test_a_run_that_slows_down_misses_its_prediction(tmp_path):
    """10 GB/s for the first 20 GB, 5 GB/s after that: 100 GB take 18 s, not 10."""
    plan = {"bytes_out": 100_000_000_000, "arrays": []}
    samples = [(1.0, 0), (3.0, 20_000_000_000), (19.0, 100_000_000_000)]
    (tmp_path / "0" / "items").mkdir(parents=True)
    found = figures(Watched(19.0, samples, {"peak_bytes": 1 << 30}), plan, tmp_path, 20_000_000_000)
    by_name = {figure.name: figure for figure in found}
    assert by_name["time that the first rate predicts"].value == pytest.approx(10)
    assert by_name["rate over the rest"].value == pytest.approx(5)
    assert by_name["time / predicted"].value == pytest.approx(1.9)
    assert by_name["time / predicted"].met is False


@pytest.mark.parametrize(
    ("figure", "met"),
    [
        (Figure("f", 1.2, "x", at_most=1.2), True),
        (Figure("f", 1.21, "x", at_most=1.2), False),
        (Figure("f", 3.4, "x", at_least=3.5), False),
        (Figure("f", 5.0, "count", at_least=5, at_most=5), True),
        (Figure("f", 4.0, "count", at_least=5, at_most=5), False),
        (Figure("f", 4.0, "s"), None),
    ],
)
def test_a_target_is_met_or_not(figure, met):
    assert figure.met is met


def test_inputs_have_values_like_weights_and_are_made_once(tmp_path):
    source = make(bf16_input(tiny=True), tmp_path / "bf16")
    stored = SafetensorsSource(source)
    values = stored.read("model.layers.1.mlp.up_proj.weight").astype(np.float32)
    assert values.std() == pytest.approx(WEIGHT_SCALE, rel=0.02)
    assert len({shard.name for shard in stored.shards}) == 2
    other = stored.read("model.layers.2.mlp.up_proj.weight").astype(np.float32)
    assert not np.array_equal(values, other)

    made = (source / MADE_NAME).stat().st_mtime_ns
    assert (make(bf16_input(tiny=True), source) / MADE_NAME).stat().st_mtime_ns == made
    make(bf16_input(tiny=True, layers=1), source)
    assert "model.layers.1.mlp.up_proj.weight" not in SafetensorsSource(source).tensors


def test_the_fp8_input_fills_the_range_of_its_blocks(tmp_path):
    stored = SafetensorsSource(make(fp8_input(tiny=True), tmp_path / "fp8"))
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    values = stored.read(name).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.isfinite(values).all() and np.abs(values).max() == 448
    weights = values * np.repeat(np.repeat(stored.read(f"{name}_scale_inv"), 128, 0), 128, 1)
    assert weights.std() == pytest.approx(WEIGHT_SCALE, rel=0.2)


def test_a_device_fetches_the_chunks_that_its_shard_meets():
    """Shards of 64 rows: a chunk of 128 rows serves two; of three shards one lies in two chunks of 96 rows."""
    aligned, shared, crossed = Fetched(), Fetched(), Fetched()
    aligned.add((1024, 10), (16, 1), (64, 5))
    shared.add((1024, 10), (16, 1), (128, 10))
    crossed.add((192, 1), (3, 1), (96, 1))
    assert (aligned.nbytes / aligned.wanted, aligned.chunks) == (1, 2)
    assert (shared.nbytes / shared.wanted, shared.chunks) == (2, 1)
    assert crossed.chunks == pytest.approx(4 / 3)


def test_maxtext_cuts_the_first_axis_that_sixteen_divides():
    assert maxtext_chunk((4096, 12, 128)) == (256, 12, 128)
    assert maxtext_chunk((5, 32, 128)) == (5, 2, 128)
    assert maxtext_chunk((5, 3, 128)) == (5, 3, 128)
