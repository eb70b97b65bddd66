"""Bad input, each case a run of the command: its exit code, its one line, and nothing left that looks whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import (
    BF16,
    DEEPSEEK_V3,
    FP8,
    INDEX,
    LLAMA,
    QWEN3,
    Result,
    Tensors,
    command,
    ferry,
    ferry_here,
    random_tensors,
    write_checkpoint,
)
from tests.sparse_checkpoints import deepseek_tensors, llama_tensors, write_sparse

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHT = "model.layers.1.mlp.experts.2.down_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
NORM = "model.layers.2.input_layernorm.weight"


@cache
def healthy() -> Tensors:
    return random_tensors(deepseek_tensors(DEEPSEEK_V3))


def write(source: Path, *, without: tuple[str, ...] = (), config: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A DeepSeek-V3 that is as it should be but for what is left out or replaced."""
    kept = {name: array for name, array in healthy().items() if name not in without}
    return write_checkpoint(source, config or DEEPSEEK_V3, kept | tensors)


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value))


def refused(result: Result, *words: str, code: int = 2) -> str:
    """Asserts the exit code and the one line, that it has all of `words`; returns it."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("ferry: ")]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    for word in words:
        assert word in errors[0]
    if result.stdout:
        assert json.loads(result.stdout) == {"error": errors[0].removeprefix("ferry: "), "exit_code": code}
    return errors[0]


def left_at(destination: Path) -> list[str]:
    """Names at and beside a destination that a run could have left, an empty directory aside."""
    inside = [path.name for path in destination.iterdir()] if destination.is_dir() else []
    return [*inside, *(path.name for path in destination.parent.glob(f".{destination.name}*"))]


# What is wrong with a source: each writes one, and says which words the line must have.


def missing_shard(source: Path) -> tuple[str, ...]:
    (write(source) / SECOND).unlink()
    return (SECOND, "missing")


def truncated_shard(source: Path) -> tuple[str, ...]:
    path = write(source) / SECOND
    os.truncate(path, path.stat().st_size - 1)
    return (SECOND, "truncated", str(path.stat().st_size), str(path.stat().st_size + 1))


def truncated_in_the_header(source: Path) -> tuple[str, ...]:
    os.truncate(write(source) / FIRST, 100)
    return (FIRST, "truncated")


def empty_shard(source: Path) -> tuple[str, ...]:
    os.truncate(write(source) / FIRST, 0)
    return (FIRST, "truncated")


def bytes_after_the_end(source: Path) -> tuple[str, ...]:
    with (write(source) / FIRST).open("ab") as file:
        file.write(b"\0" * 8)
    return (FIRST, "longer")


def garbage_header(source: Path) -> tuple[str, ...]:
    (write(source) / FIRST).write_bytes(struct.pack("<Q", 64) + b"\xfe" * 64)
    return (FIRST, "header")


def header_of_another_shape(source: Path) -> tuple[str, ...]:
    text = json.dumps({"a": {"dtype": "BF16", "shape": 7, "data_offsets": None}}).encode()
    (write(source) / FIRST).write_bytes(struct.pack("<Q", len(text)) + text)
    return (FIRST, "header")


def html_for_a_shard(source: Path) -> tuple[str, ...]:
    (write(source) / FIRST).write_text("<html><body>502 Bad Gateway</body></html>")
    return (FIRST,)


def index_names_a_missing_tensor(source: Path) -> tuple[str, ...]:
    write(source)
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"model.ghost.weight": FIRST}))
    return (INDEX, "model.ghost.weight", FIRST)


def index_names_the_wrong_shard(source: Path) -> tuple[str, ...]:
    write(source)
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": FIRST}))
    return (INDEX, "lm_head.weight", FIRST)


def index_is_not_json(source: Path) -> tuple[str, ...]:
    (write(source) / INDEX).write_text("{")
    return (INDEX,)


def index_maps_nothing(source: Path) -> tuple[str, ...]:
    (write(source) / INDEX).write_text('{"weight_map": ["a", "b"]}')
    return (INDEX,)


def missing_tensor(source: Path) -> tuple[str, ...]:
    write(source, without=(NORM,))
    return (NORM, "missing", "decoder/moe_layers/pre_self_attention_layer_norm/scale")


def unknown_tensor(source: Path) -> tuple[str, ...]:
    write(source, **{"model.layers.1.mlp.surprise.weight": np.zeros((2, 2), BF16)})
    return ("model.layers.1.mlp.surprise.weight", SECOND)


def wrong_shape(source: Path) -> tuple[str, ...]:
    write(source, **{NORM: np.zeros(137, BF16)})
    return (NORM, "[137]", "[136]", FIRST)


def integer_weight(source: Path) -> tuple[str, ...]:
    write(source, **{NORM: np.zeros(136, np.int32)})
    return (NORM, "int32", FIRST)


def fp8_without_scale(source: Path) -> tuple[str, ...]:
    write(source, without=(SCALE,))
    return (WEIGHT, SCALE, FIRST)


def scale_of_the_wrong_grid(source: Path) -> tuple[str, ...]:
    write(source, **{SCALE: np.ones((1, 1), np.float32)})
    return (SCALE, "[1, 1]", "[2, 1]", FIRST)


def scale_without_weight(source: Path) -> tuple[str, ...]:
    write(source, without=(WEIGHT,))
    return (WEIGHT,)


def scale_of_a_plain_weight(source: Path) -> tuple[str, ...]:
    write(source, **{WEIGHT: np.zeros((136, 56), BF16)})
    return (SCALE, WEIGHT, "bfloat16")


def fp8_of_another_kind(source: Path) -> tuple[str, ...]:
    write_checkpoint(source, DEEPSEEK_V3, healthy())
    path = source / FIRST
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F8_E4M3"', b'"dtype":"F8_E5M2"'))
    return ("float8_e5m2",)


def fp8_without_quantization_config(source: Path) -> tuple[str, ...]:
    write(source, config={key: value for key, value in DEEPSEEK_V3.items() if key != "quantization_config"})
    return ("float8_e4m3fn", "quantization_config", "config.json")


def unknown_quantization(source: Path) -> tuple[str, ...]:
    write(source, config=DEEPSEEK_V3 | {"quantization_config": {"quant_method": "bitsandbytes"}})
    return ("bitsandbytes", "config.json")


def unknown_architecture(source: Path) -> tuple[str, ...]:
    write(source, config=DEEPSEEK_V3 | {"architectures": ["DeepseekV9ForCausalLM"]})
    return ("DeepseekV9ForCausalLM", "DeepseekV3ForCausalLM", "config.json")


def no_architecture(source: Path) -> tuple[str, ...]:
    without = {key: value for key, value in DEEPSEEK_V3.items() if key not in ("architectures", "model_type")}
    write(source, config=without)
    return ("config.json", "missing", "--model")


def missing_config(source: Path) -> tuple[str, ...]:
    (write(source) / "config.json").unlink()
    return ("config.json", str(source))


def config_is_not_json(source: Path) -> tuple[str, ...]:
    (write(source) / "config.json").write_text('{"architectures": [')
    return ("config.json", "not JSON")


def config_is_a_list(source: Path) -> tuple[str, ...]:
    (write(source) / "config.json").write_text("[]")
    return ("config.json", "object")


def config_without_a_size(source: Path) -> tuple[str, ...]:
    write(source, config={key: value for key, value in DEEPSEEK_V3.items() if key != "kv_lora_rank"})
    return ("config.json", "kv_lora_rank")


def config_with_a_word_for_a_size(source: Path) -> tuple[str, ...]:
    write(source, config=DEEPSEEK_V3 | {"num_hidden_layers": "three"})
    return ("config.json", "num_hidden_layers", "three")


def too_many_dense_layers(source: Path) -> tuple[str, ...]:
    write(source, config=DEEPSEEK_V3 | {"first_k_dense_replace": 2})
    return ("first_k_dense_replace = 2", "config.json", "model.layers.1.mlp.gate_proj.weight")


def too_few_dense_layers(source: Path) -> tuple[str, ...]:
    write(source, config=DEEPSEEK_V3 | {"first_k_dense_replace": 0})
    return ("first_k_dense_replace = 0", "config.json", "model.layers.0.mlp.")


def too_few_layers(source: Path) -> tuple[str, ...]:
    """An ordinary layer more than num_hidden_layers counts is not taken for the MTP layer."""
    write(source, config=DEEPSEEK_V3 | {"num_hidden_layers": 2})
    return ("model.layers.2.", "num_hidden_layers = 2")


def fewer_experts_than_found(source: Path) -> tuple[str, ...]:
    write(source, config=DEEPSEEK_V3 | {"n_routed_experts": 3})
    return ("model.layers.1.mlp.gate.weight", "[4, 136]", "[3, 136]", "config.json")


def pickles_only(source: Path) -> tuple[str, ...]:
    write(source)
    for path in (source / INDEX, source / FIRST, source / SECOND):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return (str(source), "safetensors")


def missing_source(source: Path) -> tuple[str, ...]:
    return (str(source), "no directory")


def source_is_a_file(source: Path) -> tuple[str, ...]:
    source.write_text("weights")
    return (str(source), "no directory")


NAMED = [missing_shard, truncated_shard, unknown_architecture]
"""Run as processes, as a user meets them."""

MORE = [
    index_names_a_missing_tensor,
    wrong_shape,
    fp8_without_scale,
    scale_of_the_wrong_grid,
    missing_config,
    config_is_not_json,
    too_many_dense_layers,
    too_few_dense_layers,
    truncated_in_the_header,
    empty_shard,
    bytes_after_the_end,
    garbage_header,
    header_of_another_shape,
    html_for_a_shard,
    index_names_the_wrong_shard,
    index_is_not_json,
    index_maps_nothing,
    missing_tensor,
    unknown_tensor,
    integer_weight,
    scale_without_weight,
    scale_of_a_plain_weight,
    fp8_of_another_kind,
    fp8_without_quantization_config,
    unknown_quantization,
    no_architecture,
    config_is_a_list,
    config_without_a_size,
    config_with_a_word_for_a_size,
    too_few_layers,
    fewer_experts_than_found,
    pickles_only,
    missing_source,
    source_is_a_file,
]


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
