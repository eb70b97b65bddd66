"""Faults while a conversion runs, each in a real process: a disk that fails or fills, a source that changes, SIGTERM.

What the next run makes of it is tested with it: the same command goes on where that is right, and is refused with one
clear line where it is not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.bad_sources import edit_json
from tests.support.checkpoints import (
    BF16,
    QWEN3,
    Result,
    Tensors,
    answer,
    command,
    ferry_here,
    random_tensors,
    refused,
    write_checkpoint,
)
from tests.support.faults import Fault, Run, build_shim
from tests.support.sparse_checkpoints import llama_tensors

CONFIG = QWEN3 | {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 12_007}
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """87 MB."""
    return random_tensors(llama_tensors(CONFIG))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, tensors) -> Path:
    """Not to be changed: tests that change it make their own."""
    return write_checkpoint(tmp_path_factory.mktemp("source"), CONFIG, tensors, shards=3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, healthy) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert ferry_here("convert", healthy, out).returncode == 0
    return out


@pytest.fixture
def source(tmp_path, healthy) -> Path:
    """A copy to spoil."""
    return shutil.copytree(healthy, tmp_path / "source")


def convert(source: Path, destination: Path, *options: object) -> list[str]:
    """On one thread and in small groups, so that there is a middle."""
    return command("convert", source, destination, "--memory-budget", "64MiB", "--threads", 1, "--json", *options)


def run(arguments: list[str], shim: Path, fault: Fault | None = None) -> Result:
    return Run(arguments, shim, fault).end()


def killed_midway(arguments: list[str], shim: Path) -> None:
    """Ends with some groups journaled: before the fourth is."""
    stopped = Run(arguments, shim, Fault("sync", "*/.ferry/journal*", nth=4))
    stopped.wait_until_stopped()
    stopped.kill()


def looks_unfinished(out: Path) -> bool:
    return [path.name for path in out.iterdir()] == [".ferry"]


def journal_size(out: Path) -> int:
    return sum(path.stat().st_size for path in (out / ".ferry").glob("journal*.jsonl"))


def assert_same(a: Path, b: Path) -> None:
    assert json.loads(ferry_here("compare", a, b, "--json").stdout)["same"]


# Reading fails.


def test_a_read_error_in_one_shard(tmp_path, healthy, undisturbed, shim):
    """Which shard, which tensor, how far it got; and the next run goes on from there."""
    arguments = convert(healthy, tmp_path / "out")
    failed = run(arguments, shim, Fault("read", f"*/{SHARDS[1]}", nth=12, what="eio"))
    line = refused(failed, SHARDS[1], "Input/output error", code=3)
    assert re.search(r"tensor model\.\S+ ", line)
    told = re.search(r"(\d+\.\d) MB of (87\.\d) MB", line)
    assert told, line
    done, whole = float(told[1]), float(told[2])
    assert 0 < done < whole
    assert looks_unfinished(tmp_path / "out")
    result = answer(run(arguments, shim))
    assert result["pieces_skipped"] > 0
    # both are told to a tenth of a megabyte
    assert result["bytes_out"] == pytest.approx((whole - done) * 1e6, abs=0.1e6)
    assert_same(tmp_path / "out", undisturbed)


def test_a_shard_cut_short_while_it_is_read(tmp_path, source, shim):
    """Found when the reading gets there; the next run finds it in the header and does not begin."""
    arguments = convert(source, tmp_path / "out")
    stopped = Run(arguments, shim, Fault("sync", "*/.ferry/journal*", nth=1))
    stopped.wait_until_stopped()
    os.truncate(source / SHARDS[2], (source / SHARDS[2]).stat().st_size // 2)
    stopped.go_on()
    line = refused(stopped.end(), SHARDS[2], "the file ends at byte", code=3)
    assert re.search(r"tensor \S+ failed", line)
    assert re.search(r"\d+\.\d MB of 87\.\d MB", line)
    refused(run(arguments, shim), SHARDS[2], "truncated")


# The source changes.


def rewrite(path: Path) -> None:
    """Other bytes in the last tensor; header and size stay."""
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(os.urandom(1000))


@pytest.mark.parametrize("resumed", [False, True], ids=["first run", "resumed run"])
def test_a_shard_rewritten_behind_the_reader(tmp_path, source, shim, resumed):
    """What was read of it already is in the result: noticed before the commit, and nothing is kept."""
    arguments = convert(source, tmp_path / "out")
    if resumed:
        killed_midway(arguments, shim)
    stopped = Run(arguments, shim, Fault("sync", "*/.ferry/journal*", nth=2))
    stopped.wait_until_stopped()
    rewrite(source / SHARDS[0])
    stopped.go_on()
    refused(stopped.end(), SHARDS[0], "changed")
    assert list((tmp_path / "out").iterdir()) == []


def shard_rewritten(source: Path, out: Path) -> tuple[str, ...]:
    rewrite(source / SHARDS[1])
    return ("source", SHARDS[1])


def config_changed(source: Path, out: Path) -> tuple[str, ...]:
    edit_json(source / "config.json", lambda config: config.update(rope_theta=10_000))
    return ("config", "rope_theta", "1000000", "10000")


def other_version(source: Path, out: Path) -> tuple[str, ...]:
    edit_json(out / ".ferry" / "run.json", lambda note: note["identity"].update(format="0"))
    return ("format", "0 there")


def other_target(source: Path, out: Path) -> tuple[str, ...]:
    edit_json(out / ".ferry" / "run.json", lambda note: None)
    return ("scan_layers", "True", "False")


@pytest.mark.parametrize("change", [shard_rewritten, config_changed, other_version, other_target])
def test_what_changed_between_a_kill_and_the_next_run(tmp_path, source, undisturbed, shim, change: Callable):
    """Refused by name, and kept; --overwrite starts over and writes what is there now."""
    out = tmp_path / "out"
    options = ("--no-scan-layers",) if change is other_target else ()
    killed_midway(convert(source, out), shim)
    kept = journal_size(out)
    words = change(source, out)
    line = refused(run(convert(source, out, *options), shim), str(out), "unfinished", "--overwrite", *words)
    assert len(line) < 500
    assert journal_size(out) == kept > 0
    assert looks_unfinished(out)

    result = answer(run(convert(source, out, *options, "--overwrite"), shim))
    assert result["pieces_skipped"] == 0
    fresh = undisturbed  # of a source with the same weights
    if change in (shard_rewritten, other_target):
        fresh = tmp_path / "fresh"
        assert ferry_here("convert", source, fresh, *options).returncode == 0
    assert_same(out, fresh)


# Writing fails.

FULL_MOMENTS = {
    "while chunks are written": (("--no-ocdbt",), "write", "/.ferry/0/items/*/c/*", 12),
    "while the parts are merged": ((), "write", "/.ferry/0/items/d/*", 1),
    "while the merged manifest is written": ((), "write", "/.ferry/0/items/manifest.ocdbt*", 2),
    "while the metadata are written": ((), "write", "/.ferry/0/items/*METADATA*", 1),
    "while the last mark is written": ((), "write", "/.ferry/0/*commit_success*", 2),
}


@pytest.mark.parametrize("moment", FULL_MOMENTS)
def test_a_disk_that_is_full(tmp_path, healthy, undisturbed, shim, moment):
    """Exit 3, the journal kept; once there is room the same command ends well and leaves nothing behind."""
    storage, call, below, nth = FULL_MOMENTS[moment]
    out = tmp_path / "out"
    arguments = convert(healthy, out, *storage)
    refused(run(arguments, shim, Fault(call, f"{out}{below}", nth, "enospc")), "No space left on device", code=3)
    assert looks_unfinished(out)
    assert journal_size(out) > 0
    assert answer(run(arguments, shim))["pieces_skipped"] > 0
    assert_same(out, undisturbed)
    assert not [path for path in out.rglob("*") if path.name.endswith((".__lock", ".tmp"))]


# Memory.


def test_a_budget_smaller_than_the_largest_chunk_cuts_smaller(tmp_path, healthy, undisturbed, shim):
    """The vocabulary is 25 MB: one chunk under the default, an eighth of the budget at most under a small one."""
    plans = {
        budget: json.loads(ferry_here("plan", healthy, "--memory-budget", budget, "--json").stdout)
        for budget in ("2GiB", "64MiB")
    }
    largest = {
        budget: max(2 * int(np.prod(array["chunk_shape"])) for array in plan["arrays"])
        for budget, plan in plans.items()
    }
    assert largest["64MiB"] <= 8 << 20 < largest["2GiB"]
    answer(run(convert(healthy, tmp_path / "out"), shim))
    assert_same(tmp_path / "out", undisturbed)


def test_the_smallest_budget_is_named(tmp_path, healthy):
    for command_name in ("plan", "convert"):
        destination = () if command_name == "plan" else (tmp_path / "out",)
        result = ferry_here(command_name, healthy, *destination, "--memory-budget", (64 << 20) - 1)
        refused(result, str((64 << 20) - 1), "the minimum is 64MiB")
    assert not (tmp_path / "out").exists()


# SIGTERM.

MODEL = QWEN3 | {
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "vocab_size": 24_000,
}
GRACE = 5.0
"""Seconds from SIGTERM to the end: what a scheduler waits at the least before it kills."""
PHASES = {
    "reading": ("read", "*/model-00002-of-00003.safetensors", 8),
    "committing": ("sync", "*/ocdbt.process_*/d/*", 4),
    "journaling": ("sync", "*/.ferry/journal*.jsonl", 2),
    "merging": ("rename", "*/items/manifest.ocdbt", 1),
    "sweeping": ("sync", "*/items/*_METADATA*", 1),
    "writing the metadata": ("rename", "*/items/_METADATA", 1),
    "moving into place": ("rename", "*/out/0", 1),
}
WRITING = {"reading", "committing", "journaling"}


@pytest.fixture(scope="module")
def heavy(tmp_path_factory) -> Path:
    """0.7 GB of normal values, as weights have them: work for the codec."""
    values = np.random.default_rng(0).standard_normal(50_000_000, np.float32).astype(BF16)
    model = {}
    for place, (name, shape, _) in enumerate(llama_tensors(MODEL)):
        count = int(np.prod(shape))
        model[name] = values[1000 * place : 1000 * place + count].reshape(shape)
    return write_checkpoint(tmp_path_factory.mktemp("heavy"), MODEL, model, shards=3)


def terminated(arguments: list[str], shim: Path, fault: Fault) -> float:
    """Sends SIGTERM at a moment; returns the seconds until the end, which must be with 143."""
    process = Run(arguments, shim, fault)
    process.wait_until_stopped()
    started = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    process.go_on()
    result = process.end()
    seconds = time.monotonic() - started
    assert result.returncode == 143, (result.returncode, result.stdout, result.stderr)
    assert json.loads(result.stdout)["exit_code"] == 143
    assert "Traceback" not in result.stderr
    return seconds


@pytest.mark.parametrize(("model", "budget"), [("heavy", "2GiB"), ("healthy", "64MiB")])
def test_sigterm_at_any_phase(tmp_path, request, shim, model, budget):
    """Again and again on one conversion, under the largest buffers and under the smallest, where workers wait.

    What a signal ends is nearly all kept, so that the phases of writing begin anew each.

    The signal is sent while the process is stopped at the phase; the seconds count from when it goes on.
    """
    out = tmp_path / "out"
    source = request.getfixturevalue(model)
    arguments = command("convert", source, out, "--memory-budget", budget, "--json", "--quiet")
    seconds, kept = {}, 0
    for phase, (call, glob, nth) in PHASES.items():
        if phase in WRITING:
            shutil.rmtree(out, ignore_errors=True)
            kept = 0
        seconds[phase] = terminated(arguments, shim, Fault(call, glob, nth))
        assert journal_size(out) >= kept
        kept = journal_size(out)
    assert max(seconds.values()) < GRACE, seconds
    assert answer(run(arguments, shim))["already"], "the last signal came when it was in place"
