"""Parts of a conversion as real processes: at once, and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conversion_lib.runs.trees import maxtext_staging
from conversion_lib.runs.workspace import unfinished
from tests.conversion_lib.conversions.test_parts_together import deepseek, refused, same
from tests.support.checkpoints import QWEN3, WRITTEN, answer, command, ferry_here, random_tensors, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors


def qwen(directory: Path) -> Path:
    """24 MB and more in one array, so that budgets would cut its chunks differently, and there is time for a kill."""
    config = QWEN3 | {"vocab_size": 12_011, "hidden_size": 1024}
    return write_checkpoint(directory, config, random_tensors(llama_tensors(config)), shards=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return deepseek(tmp_path_factory.mktemp("source") / "fp8")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return qwen(tmp_path_factory.mktemp("large") / "qwen3")


@pytest.mark.parametrize(
    "options", [(), ("--pathways", "--no-scan-layers")], ids=["ocdbt-scanned", "pathways-unscanned"]
)
def test_four_processes_at_once(tmp_path, large, options):
    """They begin at the same moment, with other memory and threads each, and agree on chunks and shares."""
    out = tmp_path / "out"
    budgets = ["64MiB", "96MiB", "512MiB", "2GiB"]
    workers = [
        subprocess.Popen(
            [*command("convert", large, out, *options, *part), "--memory-budget", budget, "--threads", str(index + 1)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, budget in enumerate(budgets)
        for part in [("--part", f"{index}/4", "--json")]
    ]
    results = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, results
    assert {json.loads(stdout)["already"] for stdout, _ in results} == {False}
    noted = unfinished(maxtext_staging(out))
    assert noted is not None
    done = answer(ferry_here("finalize", out, "--json"))
    assert done["chunks"] == sum(noted.chunks)
    assert ferry_here("convert", large, tmp_path / "whole", *options).returncode == 0
    assert same(out, tmp_path / "whole")
    assert not list(out.rglob("*.__lock"))
    (embedding,) = [leaf for leaf in leaves(out) if leaf["path"].endswith("token_embedder/embedding")]
    chunk = embedding["chunk_shape"]
    assert chunk[0] * chunk[1] * 2 <= noted.chunk_limit


def leaves(checkpoint: Path) -> list[dict]:
    return answer(ferry_here("inspect", checkpoint, "--json"))["leaves"]


def test_a_killed_part_goes_on(tmp_path, large):
    out = tmp_path / "out"
    arguments = command("convert", large, out, "--json", "--save-dtype", "float32", "--memory-budget", "64MiB")
    arguments += ["--threads", "1", "--part"]
    process = subprocess.Popen([*arguments, "1/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = out / ".ferry/journal-1.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL

    others = json.loads(subprocess.run([*arguments, "0/2"], capture_output=True, check=True, timeout=60).stdout)
    assert others["pieces_skipped"] == 0
    refused(ferry_here("finalize", out), "part 1/2 has", "chunks left to write")
    again = json.loads(subprocess.run([*arguments, "1/2"], capture_output=True, check=True, timeout=60).stdout)
    assert again["pieces_skipped"] > 0
    assert again["pieces"] > 0
    assert ferry_here("finalize", out).returncode == 0
    whole = ferry_here("convert", large, tmp_path / "whole", "--save-dtype", "float32")
    assert whole.returncode == 0
    assert same(out, tmp_path / "whole")
    assert not list(out.rglob("*.__lock"))
    sizes = [
        sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) for root in (out, tmp_path / "whole")
    ]
    assert sizes[0] < 1.1 * sizes[1], "what the kill left is swept"


KILLED = """
import os, shutil, signal, sys
left = int(sys.argv.pop(1))
def deadly(function):
    def called(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return called
from conversion_lib.sinks import ocdbt
for owner, names in ((os, ("rename", "replace")), (shutil, ("rmtree",)), (ocdbt, ("merge", "sweep"))):
    for name in names:
        setattr(owner, name, deadly(getattr(owner, name)))
from conversion_lib.cli.main import main
main()
"""
"""`ferry`, killed before the nth of the calls that change what others see."""


@pytest.mark.parametrize(("replacing", "first"), [(True, 0), (False, 5)], ids=["replacing", "fresh"])
def test_a_kill_at_any_moment_of_finalize(tmp_path, source, replacing, first):
    """Run again, it makes the new checkpoint, whether there was an old one or not."""
    prepared, target = tmp_path / "prepared", ("--no-zarr3",)
    if replacing:
        assert ferry_here("convert", source, prepared).returncode == 0
    for part in ("0/2", "1/2"):
        assert ferry_here("convert", source, prepared, "--part", part, *target, "--overwrite").returncode == 0
    assert ferry_here("convert", source, tmp_path / "whole", *target).returncode == 0
    for calls in range(first, 100):  # up to the fifth the two are the same
        out = tmp_path / f"killed-{calls}"
        shutil.copytree(prepared, out)
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, str(calls), "finalize", str(out)],
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert ferry_here("finalize", out).returncode == 0
        assert same(out, tmp_path / "whole")
        assert sorted(path.name for path in out.iterdir()) == WRITTEN
        assert not json.loads((out / "ferry.json").read_text())["target"]["zarr3"]
        assert (out / "hf/config.json").exists()
    assert calls >= (12 if replacing else 9)
