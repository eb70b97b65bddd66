"""How fast `ferry publish` is, and what memory it takes, against the client's own transfer manager."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from conversion_lib.record import CheckpointRecord, Origin, Target
from tests.benchmarks.contest import FERRY, HERE, ratio
from tests.benchmarks.processes import Measured, measure, settle
from tests.benchmarks.results import Figure
from tests.support.fakes.cloud_storage import in_own_process

MEMORY_LIMIT = 1024  # MiB


def publish_figures(work: Path, rounds: int, *, tiny: bool, cold: bool) -> dict[str, list[Figure]]:
    """Many small files and a few large ones, each to an empty Cloud Storage in a process of its own.

    `ferry publish --unchecked`: it reads what it publishes once more than the other, for the digest; `ferry check`
    leaves that behind for it.
    """
    shapes = {"many": (2_000, 1_000_000), "large": (20, 200_000_000)}
    if tiny:
        shapes = {"many": (40, 10_000), "large": (3, 9_000_000)}
    return {
        f"publish {count} files of {size / 1e6:g} MB": _figures(
            _make(work / f"publish-{name}", count, size), rounds, cold
        )
        for name, (count, size) in shapes.items()
    }


def _figures(checkpoint: Path, rounds: int, cold: bool) -> list[Figure]:
    commands = {
        "ferry": [FERRY, "publish", "--unchecked", "--quiet", checkpoint, "gs://bucket/models"],
        "plain": [sys.executable, HERE / "plain_upload.py", checkpoint, "bucket"],
    }
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            settle(checkpoint, cold=cold)
            with in_own_process("bucket") as endpoint:
                runs[name].append(measure(command, {"STORAGE_EMULATOR_HOST": endpoint}))
            print(f"  publish, {name}: {runs[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    cpu = {name: [run.cpu_seconds for run in found] for name, found in runs.items()}
    peak = max(run.peak_bytes for run in runs["ferry"]) / (1 << 20)
    return [
        Figure.median("ferry publish", seconds["ferry"], "s"),
        Figure.median("the client's transfer manager", seconds["plain"], "s"),
        Figure("speed, ferry's / the transfer manager's", ratio(seconds["plain"], seconds["ferry"]), "x", at_least=0.7),
        Figure("processor time, ferry's / the transfer manager's", ratio(cpu["ferry"], cpu["plain"]), "x"),
        Figure("memory, ferry publish", peak, "MiB", at_most=MEMORY_LIMIT),
    ]


def _make(root: Path, count: int, size: int) -> Path:
    """A checkpoint of so many incompressible files; kept for the next time."""
    record = CheckpointRecord(
        ferry_version="0",
        fingerprint="sha256:" + "0" * 64,
        identity={},
        family="none",
        model_name="bytes",
        origin=Origin(path="none"),
        target=Target(),
        arrays=count,
        bytes_in=count * size,
        bytes_out=count * size,
        exact=True,
    )
    if not (root / "ferry.json").exists():
        random = np.random.default_rng(0)
        (root / "0" / "items" / "d").mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (root / "0" / "items" / "d" / f"{index:05}").write_bytes(random.bytes(size))
        (root / "0" / "commit_success.txt").write_text("")
        (root / "ferry.json").write_text(record.model_dump_json())
    return root
