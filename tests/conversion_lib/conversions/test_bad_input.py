"""Bad input, each case a run of the command: its exit code, its one line, and nothing left that looks whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support.bad_sources import (
    FIRST,
    MORE,
    NAMED,
    SCALE,
    fp8_without_scale,
    healthy,
    missing_shard,
    scale_of_the_wrong_grid,
    truncated_shard,
    write,
)
from tests.support.checkpoints import (
    DEEPSEEK_V3,
    FP8,
    LLAMA,
    QWEN3,
    Result,
    command,
    ferry,
    ferry_here,
    random_tensors,
    refused,
    write_checkpoint,
)
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors, write_sparse


def left_at(destination: Path) -> list[str]:
    """Names at and beside a destination that a run could have left, an empty directory aside."""
    inside = [path.name for path in destination.iterdir()] if destination.is_dir() else []
    return [*inside, *(path.name for path in destination.parent.glob(f".{destination.name}*"))]


@pytest.mark.parametrize(
    ("run", "case"),
    [*((ferry, case) for case in NAMED), *((ferry_here, case) for case in MORE)],
    ids=lambda value: value.__name__,
)
def test_what_headers_and_config_tell(tmp_path, run, case):
    """Refused before a byte is written: not even the destination's directory is made."""
    words = case(tmp_path / "source")
    refused(run("convert", tmp_path / "source", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()
    assert left_at(tmp_path / "out") == []


@pytest.mark.parametrize(
    "case", [truncated_shard, fp8_without_scale, scale_of_the_wrong_grid], ids=lambda c: c.__name__
)
def test_dequantize_refuses_the_same(tmp_path, case):
    words = case(tmp_path / "source")
    refused(ferry_here("dequantize", tmp_path / "source", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()
    assert left_at(tmp_path / "out") == []


def test_a_config_that_names_other_weights(tmp_path):
    """transformers would read those."""
    tensors = random_tensors(llama_tensors(QWEN3))
    for name, code in (("other.safetensors", 2), ("model.safetensors", 0), (["model.safetensors"], 2)):
        source = write_checkpoint(tmp_path / "source", QWEN3 | {"transformers_weights": name}, tensors, shards=1)
        result = ferry_here("convert", source, tmp_path / "out")
        assert result.returncode == code
        if code:
            refused(result, "transformers_weights", "model.safetensors would be read")


def test_plan_refuses_the_same(tmp_path):
    words = missing_shard(tmp_path / "source")
    refused(ferry_here("plan", tmp_path / "source"), *words)


@pytest.mark.parametrize(
    ("run", "step", "value"),
    [
        (ferry, "convert", math.nan),
        (ferry_here, "convert", math.inf),
        (ferry_here, "convert", -0.5),
        (ferry_here, "dequantize", math.nan),
        (ferry_here, "dequantize", -0.5),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_scale_that_cannot_be(tmp_path, run, step, value):
    """Only data can tell: found when it is read, and nothing of the run is kept."""
    scales = healthy()[SCALE].copy()
    scales[1, 0] = value
    write(tmp_path / "source", **{SCALE: scales})
    refused(run(step, tmp_path / "source", tmp_path / "out"), f"{SCALE}[1, 0]", str(np.float32(value)), FIRST)
    assert left_at(tmp_path / "out") == []


def test_a_scale_of_zero_is_fine(tmp_path):
    write(tmp_path / "source", **{SCALE: np.zeros((2, 1), np.float32)})
    assert ferry_here("convert", tmp_path / "source", tmp_path / "out").returncode == 0


OPTIONS = [
    (("--model", "qwen3-0.6"), ("qwen3-0.6", "qwen3-0.6b")),
    (("--save-dtype", "float8_e4m3fn"), ("--save-dtype", "float8_e4m3fn")),
    (("--save-dtype", "float16"), ("--save-dtype", "float16", "bfloat16", "float32")),
    (("--maxtext", "0.1"), ("--maxtext", "0.1", "0.2.5", "main")),
    (("--compression", "lzma"), ("--compression", "lzma", "zstd")),
    (("--memory-budget", "plenty"), ("--memory-budget", "plenty", "2GiB")),
    (("--memory-budget", "1MiB"), ("memory", "64MiB")),
    (("--memory-budget", "0"), ("memory", "64MiB")),
    (("--chunk-bytes", "0"), ("--chunk-bytes", "0")),
    (("--chunk-bytes", "some"), ("--chunk-bytes", "some")),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=["=".join(options) for options, _ in OPTIONS])
def test_a_wrong_option(tmp_path, options, words):
    """Refused before anything is written, as what headers tell is."""
    refused(ferry_here("convert", write(tmp_path / "source"), tmp_path / "out", *options), *words)
    assert not (tmp_path / "out").exists()


def test_plan_refuses_a_budget_that_convert_would_refuse(tmp_path):
    refused(ferry_here("plan", write(tmp_path / "source"), "--memory-budget", "1MiB"), "64MiB")


# Destinations that hold something else.


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A directory with `source` and `out`, its conversion. Not to be changed: tests copy it."""
    base = tmp_path_factory.mktemp("converted")
    write_checkpoint(base / "source", QWEN3, random_tensors(llama_tensors(QWEN3)))
    assert ferry_here("convert", base / "source", base / "out").returncode == 0
    return base


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_foreign_file_at_the_destination(tmp_path, converted):
    """--overwrite does not take a stranger's files either."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(ferry_here("convert", converted / "source", out), str(out), "thesis.txt")
    refused(ferry_here("convert", converted / "source", out, "--overwrite"), "thesis.txt")
    assert contents(out) == {"thesis.txt": b"mine"}


def test_a_file_for_a_destination(tmp_path, converted):
    (tmp_path / "out").write_text("mine")
    for step in ("convert", "dequantize"):
        source = converted / "source" if step == "convert" else write(tmp_path / "fp8")
        refused(ferry_here(step, source, tmp_path / "out"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_a_checkpoint_of_another_source(tmp_path, converted):
    out = shutil.copytree(converted / "out", tmp_path / "out")
    before = contents(out)
    source = write_checkpoint(tmp_path / "source", QWEN3, random_tensors(llama_tensors(QWEN3), seed=1))
    refused(ferry_here("convert", source, out), str(out), "source", "--overwrite")
    assert contents(out) == before


def test_a_checkpoint_of_another_target(tmp_path, converted):
    out = shutil.copytree(converted / "out", tmp_path / "out")
    before = contents(out)
    line = refused(ferry_here("convert", converted / "source", out, "--save-dtype", "float32"), str(out), "--overwrite")
    assert "save_dtype" in line
    assert "scan_layers" not in line, "what is the same is not named"
    assert contents(out) == before


def test_an_orbax_checkpoint_that_is_not_ours(tmp_path, converted):
    out = shutil.copytree(converted / "out", tmp_path / "out")
    shutil.rmtree(out / "hf")
    (out / "ferry.json").unlink()
    before = contents(out)
    refused(ferry_here("convert", converted / "source", out), str(out / "0"), "not written by ferry", "--overwrite")
    assert contents(out) == before


def test_another_step_beside_ours(tmp_path, converted):
    out = shutil.copytree(converted / "out", tmp_path / "out")
    (out / "100").mkdir()
    refused(ferry_here("convert", converted / "source", out), str(out), "100")


def test_dequantize_keeps_off_what_is_not_its_own(tmp_path):
    """Whatever --overwrite says: only what ferry wrote may be replaced, never a directory of somebody's."""
    source, out = write(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(ferry_here("dequantize", source, out), str(out), "not written by ferry")
    refused(ferry_here("dequantize", source, out, "--overwrite"), str(out))
    assert contents(out) == {"thesis.txt": b"mine"}


def test_dequantize_never_replaces_its_own_source(tmp_path):
    source = write(tmp_path / "source")
    before = contents(source)
    refused(ferry_here("dequantize", source, source, "--overwrite"), str(source))
    assert contents(source) == before


def test_dequantize_of_plain_weights(tmp_path, converted):
    refused(
        ferry_here("dequantize", converted / "source", tmp_path / "out"), str(converted / "source"), "not quantized"
    )


def test_an_unfinished_run_of_another_target(tmp_path, converted):
    """What another run has begun is not thrown away without being asked."""
    work = tmp_path / "out" / ".ferry"
    work.mkdir(parents=True)
    (work / "run.json").write_text(json.dumps({"identity": {"source": "another"}, "chunk_limit": 1, "chunks": [1]}))
    refused(
        ferry_here("convert", converted / "source", tmp_path / "out"), str(work), "unfinished", "source", "--overwrite"
    )
    assert (work / "run.json").exists()


def test_compare_wants_two_of_a_kind(tmp_path, converted):
    refused(ferry_here("compare", converted / "source", converted / "out"), "source", "out", "safetensors", "maxtext")
    refused(ferry_here("compare", tmp_path, converted / "out"), str(tmp_path))
    refused(ferry_here("inspect", tmp_path / "nowhere"), "nowhere")


# Disks.


def test_a_disk_too_small_for_the_plan(tmp_path):
    """17 TB of zeros that take no room: more than the disk of any machine that runs this has free."""
    config = LLAMA | {"vocab_size": 1 << 30, "hidden_size": 4096, "tie_word_embeddings": False, "head_dim": 16}
    source = write_sparse(tmp_path / "source", config, llama_tensors(config), shards=2)
    refused(ferry_here("convert", source, tmp_path / "out"), str(tmp_path / "out"), "18.47 TB", "--skip-disk-check")
    assert not (tmp_path / "out").exists()


FULL_THEN_LARGER = """
mount -t tmpfs -o size=14m ferry-test "$DISK" || exit 99
"$@" >"$LOGS/first.out" 2>"$LOGS/first.err"; echo $? >"$LOGS/first.code"
cp -a "$DISK" "$LOGS/left"
mount -o remount,size=200m "$DISK"
"$@" >"$LOGS/second.out" 2>"$LOGS/second.err"; echo $? >"$LOGS/second.code"
cp -a "$DISK" "$LOGS/done"
"""
"""Runs a command on a small disk that only this script and its children see, twice: enlarged in between."""


def on_a_small_disk(directory: Path, *arguments: object) -> Path:
    """Runs the script above for a `ferry` command; returns the directory with its logs."""
    logs = directory / "logs"
    logs.mkdir()
    (directory / "disk").mkdir(exist_ok=True)
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    script = [*namespace, "sh", "-c", FULL_THEN_LARGER, "sh", *command(*arguments)]
    env = os.environ | {"DISK": str(directory / "disk"), "LOGS": str(logs)}
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=200, check=False)
    if not (logs / "first.code").exists():
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    return logs


def logged(logs: Path, run: str) -> Result:
    out, err = ((logs / f"{run}.{stream}").read_text() for stream in ("out", "err"))
    return Result([], int((logs / f"{run}.code").read_text()), out, err)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
@pytest.mark.parametrize("step", ["convert", "dequantize"])
def test_a_disk_that_is_full_midway(tmp_path, step):
    """Exit 3 and nothing that looks whole; with more room the same command goes on to the same result."""
    config = DEEPSEEK_V3 | {"vocab_size": 40_009}
    source = write_checkpoint(tmp_path / "source", config, random_tensors(deepseek_tensors(config)))
    options = ("--memory-budget", "64MiB", "--threads", 2)
    logs = on_a_small_disk(tmp_path, step, source, tmp_path / "disk" / "out", *options, "--skip-disk-check", "--json")

    refused(logged(logs, "first"), "No space left on device", "again", code=3)
    found = sorted(str(path.relative_to(logs / "left")) for path in (logs / "left").glob("*/*"))
    work = {"convert": "out/.ferry", "dequantize": ".out.ferry/build"}[step]
    assert work in found
    assert not [path for path in found if path.startswith("out/") and path != work]

    second = logged(logs, "second")
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["pieces_skipped"] > 0
    assert ferry_here(step, source, tmp_path / "undisturbed", *options).returncode == 0
    assert ferry_here("compare", logs / "done" / "out", tmp_path / "undisturbed").returncode == 0
    if step == "convert":
        import orbax.checkpoint as ocp

        assert ocp.CheckpointManager(logs / "left" / "out").latest_step() is None
        assert ocp.CheckpointManager(logs / "done" / "out").latest_step() == 0


# Not bad at all: the config's spelling.


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "text_config"])
def test_a_config_in_either_spelling(tmp_path, nested):
    """transformers 4 writes torch_dtype and rope_theta, transformers 5 dtype and rope_parameters: the plan is one."""
    tensors = random_tensors(llama_tensors(LLAMA))
    renamed = {key: value for key, value in LLAMA.items() if key not in ("torch_dtype", "rope_theta")}
    renamed |= {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    if nested:
        top = {"architectures": renamed.pop("architectures"), "model_type": "llama"}
        renamed = top | {"text_config": renamed}
    plans = []
    for name, config in (("old", LLAMA), ("new", renamed)):
        source = write_checkpoint(tmp_path / name, config, tensors)
        plans.append(json.loads(ferry_here("plan", source, "--json").stdout))
    assert plans[0]["arrays"] == plans[1]["arrays"]
    assert plans[0]["bytes_out"] == plans[1]["bytes_out"] > 0


def test_fp8_values_are_all_finite_bytes():
    """What the other tests rely on: random fp8 holds no NaN, whose byte is 0x7f."""
    codes = [array.view(np.uint8) & 0x7F for array in healthy().values() if array.dtype == FP8]
    assert codes
    assert all(code.max() < 0x7F for code in codes)
