"""How long `ferry check` takes on a model of 1.2 billion parameters, and what memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.benchmarks.contest import FERRY
from tests.benchmarks.inputs import QWEN3_8B, TINY_QWEN3, Input, make
from tests.benchmarks.processes import Measured, measure, settle
from tests.benchmarks.results import Figure

QWEN3_1B = QWEN3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_hidden_layers": 18,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
"""Qwen3-1.7B with 18 of its 28 layers, and its whole vocabulary."""

LONGEST, BUDGET = 120, 6 << 10
"""Seconds for a prompt of 512 tokens on two cores; MiB, the default of --memory-budget."""


def check_figures(work: Path, rounds: int, *, tiny: bool, cold: bool) -> dict[str, list[Figure]]:
    """`ferry check` as a process, each time of a checkpoint that was not checked before; figures by their title."""
    wanted = Input("qwen3-check", TINY_QWEN3 if tiny else QWEN3_1B, shards=2)
    source, converted = make(wanted, work / wanted.name), work / "checked"
    shutil.rmtree(converted, ignore_errors=True)
    measure([FERRY, "convert", source, converted, "--scan-layers", "--quiet"])
    runs: list[Measured] = []
    for _ in range(rounds):
        shutil.rmtree(converted / "report", ignore_errors=True)
        settle(source, cold=cold)
        command = [FERRY, "check", converted, "--reference", source, "--tokens", 512, "--json", "--quiet"]
        runs.append(measure(command))
        print(f"  check: {runs[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    shutil.rmtree(converted)
    title = f"ferry check, {wanted.nbytes / 2e9:.2f} billion parameters, 512 tokens"
    said = json.loads(runs[-1].output)
    figures = [
        Figure.median("wall time", [run.seconds for run in runs], "s", **({} if tiny else {"at_most": LONGEST})),
        Figure.median("processor time", [run.cpu_seconds for run in runs], "s"),
        Figure("memory", max(run.peak_bytes for run in runs) / (1 << 20), "MiB", at_most=BUDGET + 512),
        Figure("tokens compared", said["tokens_compared"], "count"),
        Figure("largest KL of a token, in 1e-12 nats", said["max_kl"] * 1e12, "x"),
    ]
    return {title: figures}
