"""`ferry` as a process: what it prints where, its exit codes, and what a kill leaves behind."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.conversion_lib.cli.test_long_work import size_of
from tests.support.checkpoints import (
    DEEPSEEK_V3,
    LLAMA,
    QWEN3,
    Array,
    Tensors,
    answer,
    ferry,
    ferry_here,
    random_tensors,
    write_checkpoint,
)
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors

COMMANDS = ("models", "plan", "download", "dequantize", "convert", "check", "publish", "verify", "inspect", "compare")
COMMANDS += ("export", "finalize", "prune", "clean", "demo")

BYTES = {"bfloat16": 2, "float32": 4, "int64": 8}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(llama_tensors(QWEN3))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory, tensors) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen3"), QWEN3, tensors)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Path:
    """fp8, with a multi-token-prediction layer."""
    source = tmp_path_factory.mktemp("deepseek")
    return write_checkpoint(source, DEEPSEEK_V3, random_tensors(deepseek_tensors(DEEPSEEK_V3)), shards=3)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, qwen3) -> Path:
    """Qwen 3 in every default. Not to be changed."""
    out = tmp_path_factory.mktemp("converted") / "out"
    assert ferry_here("convert", qwen3, out).returncode == 0
    return out


# Help and versions.


def test_version():
    for arguments in (("--version",), ("convert", "--version")):
        result = ferry(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert re.fullmatch(r"ferry \d+\.\d+\.\d+\S*\n", result.stdout)


def test_help_lists_every_command():
    result = ferry("--help")
    assert result.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", result.stdout, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name):
    result = ferry_here(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: ferry {name}")
    for option in ("--json", "--quiet", "--log-format", "--version"):
        assert option in result.stdout


@pytest.mark.parametrize("arguments", [("convert",), ("sail",), ("models", "--fast")], ids=" ".join)
def test_a_command_line_that_is_wrong(arguments):
    result = ferry_here(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


# What each command says.


def test_models():
    rows = answer(ferry_here("models", "--json"))["models"]
    families = {row["name"]: row["family"] for row in rows}
    assert families["qwen3-0.6b"] == "qwen3"
    assert families["llama3.1-8b"] == "llama3.1"
    assert families["deepseek3-671b"] == "deepseek_v3"
    text = ferry_here("models").stdout
    assert all(name in text for name in families)


def test_plan(deepseek):
    plan = answer(ferry("plan", deepseek, "--json"))
    listed = {name: shape for name, shape, _ in deepseek_tensors(DEEPSEEK_V3)}
    for array in plan["arrays"]:
        assert set(array) >= {"path", "shape", "dtype", "chunk_shape", "sources"}
        assert len(array["chunk_shape"]) == len(array["shape"])
        taken = sum(math.prod(listed[name]) for name in array["sources"])
        assert taken == math.prod(array["shape"])
    assert plan["bytes_out"] == sum(math.prod(array["shape"]) * BYTES[array["dtype"]] for array in plan["arrays"])
    assert 0 < plan["bytes_in"] < plan["bytes_out"] <= plan["disk_bytes"]
    assert plan["peak_bytes"] > 0
    assert len([line for line in plan["warnings"] if "multi-token prediction" in line]) == 1
    # every tensor but scales and the layer after the last is taken, once
    wanted = [name for name in listed if not name.endswith("_scale_inv") and ".layers.3." not in name]
    assert sorted(name for array in plan["arrays"] for name in array["sources"]) == sorted(wanted)


def test_plan_says_what_maxtext_is_told_and_what_it_does_not_compute(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LLAMA | {"rope_scaling": scaling | {"original_max_position_embeddings": 8192}}
    source = write_checkpoint(tmp_path / "hf", config, random_tensors(llama_tensors(config)))
    plan = answer(ferry_here("plan", source, "--json"))
    assert plan["maxtext"]["settings"]["model_name"] == "llama3.1-8b"
    assert plan["maxtext"]["settings"]["base_emb_dim"] == config["hidden_size"]
    line = "MaxText's model has RoPE factor 8, the original 32"
    assert plan["maxtext"]["differs"] == line
    assert plan["warnings"][-1].startswith(line)
    text = ferry_here("plan", source)
    assert text.returncode == 0 and line in text.stdout
    assert "MaxText runs it with model_name=llama3.1-8b override_model_config=true base_emb_dim=48" in text.stdout


def test_plan_for_people(deepseek):
    """In a pipe names are whole, however long: they are searched for."""
    result = ferry_here("plan", deepseek)
    assert result.returncode == 0
    for words in (
        "decoder/moe_layers/self_attention/wkv_a/kernel",
        "multi-token prediction",
        "deepseek_v3",
        "memory",
        "disk",
    ):
        assert words in result.stdout


def test_plan_writes_nothing(qwen3):
    before = sorted(qwen3.iterdir())
    ferry_here("plan", qwen3)
    assert sorted(qwen3.iterdir()) == before


def test_convert_does_what_the_plan_says(tmp_path, deepseek):
    """Arrays, shapes, dtypes and chunks are the plan's; a second run finds the work done."""
    options = ("--no-scan-layers", "--save-dtype", "float32", "--json")
    plan = answer(ferry_here("plan", deepseek, *options))
    first = answer(ferry("convert", deepseek, tmp_path / "out", *options))
    assert {key: first[key] for key in ("bytes_in", "bytes_out", "fingerprint")} == {
        key: plan[key] for key in ("bytes_in", "bytes_out", "fingerprint")
    }
    assert first["pieces"] > 0
    assert first["pieces_skipped"] == 0
    assert first["seconds"] > 0
    assert first["peak_bytes"] > 0

    kept = ("path", "shape", "dtype", "chunk_shape")
    found = answer(ferry_here("inspect", tmp_path / "out", "--json"))
    leaves = {leaf["path"]: {key: leaf[key] for key in kept} for leaf in found["leaves"] if leaf["path"] != "step"}
    assert leaves == {array["path"]: {key: array[key] for key in kept} for array in plan["arrays"]}
    assert found["metadata"]["scan_layers"] is False

    again = ferry_here("convert", deepseek, tmp_path / "out", *options[:-1])
    assert again.returncode == 0
    assert "already done" in again.stdout + again.stderr
    again = answer(ferry_here("convert", deepseek, tmp_path / "out", *options))
    assert (again["already"], again["pieces"], again["fingerprint"]) == (True, 0, first["fingerprint"])


def test_another_target_at_the_same_place(tmp_path, qwen3):
    """Refused, naming what differs; --overwrite replaces all of it."""
    out = tmp_path / "out"
    answer(ferry_here("convert", qwen3, out, "--json"))
    (out / "report").mkdir()
    error = answer(ferry_here("convert", qwen3, out, "--save-dtype", "float32", "--json"), code=2)
    assert "save_dtype" in error["error"]
    assert "--overwrite" in error["error"]
    assert error["exit_code"] == 2
    answer(ferry_here("convert", qwen3, out, "--save-dtype", "float32", "--overwrite", "--json"))
    leaves = answer(ferry_here("inspect", out, "--json"))["leaves"]
    assert {leaf["dtype"] for leaf in leaves if leaf["path"] != "step"} == {"float32"}
    assert not (out / ".ferry").exists()
    assert not (out / "report").exists(), "a report belongs to the checkpoint that it was made for"


def test_inspect_names_the_files_of_a_hugging_face_checkpoint(qwen3, tensors):
    found = answer(ferry_here("inspect", qwen3, "--json"))
    assert found["kind"] == "safetensors"
    assert found["bytes"] == sum(array.nbytes for array in tensors.values())
    listed = {leaf["path"]: (leaf["shape"], leaf["dtype"]) for leaf in found["leaves"]}
    assert listed == {name: (list(array.shape), array.dtype.name) for name, array in tensors.items()}
    assert all((qwen3 / leaf["file"]).is_file() for leaf in found["leaves"])


@pytest.mark.parametrize("part", ["", "0", "0/items"])
def test_inspect_takes_any_part_of_a_maxtext_checkpoint(converted, part):
    found = answer(ferry_here("inspect", converted / part, "--json"))
    assert (found["kind"], found["metadata"]["use_ocdbt"], found["metadata"]["use_zarr3"]) == ("maxtext", True, True)
    assert "params/params/decoder/decoder_norm/scale" in {leaf["path"] for leaf in found["leaves"]}
    assert "decoder/layers/post_self_attention_layer_norm/scale" in ferry_here("inspect", converted / part).stdout


def test_compare(tmp_path, qwen3, converted, tensors):
    """Exit 0 where all is the same, 1 where a bit is not: the leaf is named."""
    other = tensors | {"model.norm.weight": tensors["model.norm.weight"] * np.float32(2)}
    other["model.norm.weight"] = other["model.norm.weight"].astype(ml_dtypes.bfloat16)
    write_checkpoint(tmp_path / "source", QWEN3, other)
    answer(ferry_here("convert", tmp_path / "source", tmp_path / "out", "--json"))

    same = answer(ferry_here("compare", converted, converted / "0", "--json"))
    assert (same["same"], same["differences"]) == (True, [])
    for a, b, leaf in (
        (converted, tmp_path / "out", "params/params/decoder/decoder_norm/scale"),
        (qwen3, tmp_path / "source", "model.norm.weight"),
    ):
        found = answer(ferry_here("compare", a, b, "--json"), code=1)
        assert found["same"] is False
        assert [(row["path"], row["what"]) for row in found["differences"]] == [(leaf, "bits")]
    result = ferry("compare", converted, tmp_path / "out")
    assert result.returncode == 1
    assert "params/params/decoder/decoder_norm/scale" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("ferry: 1 of ")


def test_staged_and_fused_give_the_same_bits(tmp_path, deepseek):
    for dtype in ("bfloat16", "float32"):
        options = ("--save-dtype", dtype)
        answer(ferry_here("dequantize", deepseek, tmp_path / "bf16", "--json"))
        answer(ferry_here("convert", tmp_path / "bf16", tmp_path / f"staged-{dtype}", *options, "--json"))
        answer(ferry_here("convert", deepseek, tmp_path / f"fused-{dtype}", *options, "--json"))
        answer(ferry_here("compare", tmp_path / f"staged-{dtype}", tmp_path / f"fused-{dtype}", "--json"))
    dtypes = {leaf["dtype"] for leaf in answer(ferry_here("inspect", tmp_path / "bf16", "--json"))["leaves"]}
    assert dtypes == {"bfloat16", "float32"}  # the router's correction bias was float32 and stays so
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())


# What is written, as Orbax reads it.


def expected_leaves(tensors: Tensors) -> dict[str, Array]:
    """Qwen 3 in MaxText's scanned layout, from what is known of that layout: layers stacked on axis 1."""
    hidden, heads, kv_heads, size = (
        QWEN3[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )

    def stacked(name: str, *shape: int) -> Array:
        """The tensor of each layer, transposed where it is a matrix, in `shape`."""
        layers = (tensors[f"model.layers.{i}.{name}.weight"].T for i in range(QWEN3["num_hidden_layers"]))
        return np.stack([layer.reshape(shape or layer.shape) for layer in layers], axis=1)

    layers = {
        "pre_self_attention_layer_norm/scale": stacked("input_layernorm"),
        "post_self_attention_layer_norm/scale": stacked("post_attention_layernorm"),
        "self_attention/query/kernel": stacked("self_attn.q_proj", hidden, heads, size),
        "self_attention/key/kernel": stacked("self_attn.k_proj", hidden, kv_heads, size),
        "self_attention/value/kernel": stacked("self_attn.v_proj", hidden, kv_heads, size),
        "self_attention/out/kernel": stacked("self_attn.o_proj", heads, size, hidden),
        "self_attention/query_norm/scale": stacked("self_attn.q_norm"),
        "self_attention/key_norm/scale": stacked("self_attn.k_norm"),
        "mlp/wi_0/kernel": stacked("mlp.gate_proj"),
        "mlp/wi_1/kernel": stacked("mlp.up_proj"),
        "mlp/wo/kernel": stacked("mlp.down_proj"),
    }
    return {
        "token_embedder/embedding": tensors["model.embed_tokens.weight"],
        "decoder/decoder_norm/scale": tensors["model.norm.weight"],
        "decoder/logits_dense/kernel": tensors["lm_head.weight"].T,
        **{f"decoder/layers/{path}": array for path, array in layers.items()},
    }


def restored(items: Path) -> dict[str, Array]:
    """Every parameter as Orbax restores it, by its path below params/params."""
    import jax
    import orbax.checkpoint as ocp

    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(items).item_metadata.tree
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = checkpointer.restore(items, restore_args=arguments)
    assert found["step"] == 0
    leaves, _ = jax.tree_util.tree_flatten_with_path(found["params"]["params"])
    return {"/".join(key.key for key in path): array for path, array in leaves}


STORAGE = {
    (True, True): (),
    (True, False): ("--no-zarr3",),
    (False, True): ("--no-ocdbt",),
    (False, False): ("--pathways",),
}


@pytest.mark.parametrize(("ocdbt", "zarr3"), STORAGE, ids=lambda flag: str(flag).lower())
def test_orbax_restores_every_kind_of_storage(tmp_path, qwen3, tensors, ocdbt, zarr3):
    answer(ferry_here("convert", qwen3, tmp_path / "out", *STORAGE[ocdbt, zarr3], "--json"))
    items = tmp_path / "out" / "0" / "items"
    assert (items / "manifest.ocdbt").exists() is ocdbt
    if not ocdbt:
        assert bool(list(items.rglob("zarr.json"))) is zarr3
        assert bool(list(items.rglob(".zarray"))) is not zarr3
    metadata = json.loads((items / "_METADATA").read_text())
    assert (metadata["use_ocdbt"], metadata["use_zarr3"]) == (ocdbt, zarr3)

    found, expected = restored(items), expected_leaves(tensors)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype
        assert found[path].shape == array.shape
        assert found[path].tobytes() == np.ascontiguousarray(array).tobytes(), path


def test_pathways_is_neither(tmp_path, qwen3):
    """The same run as with both flags off, by either spelling."""
    first = answer(ferry_here("convert", qwen3, tmp_path / "out", "--pathways", "--json"))
    again = answer(ferry_here("convert", qwen3, tmp_path / "out", "--no-ocdbt", "--no-zarr3", "--json"))
    assert (again["already"], again["fingerprint"]) == (True, first["fingerprint"])


# Where things are printed.


def test_quiet_is_silent(tmp_path, deepseek):
    assert ferry("convert", deepseek, tmp_path / "out", "--quiet").stderr == ""


def test_quiet_says_what_is_wrong(tmp_path):
    result = ferry_here("convert", tmp_path / "nowhere", tmp_path / "out", "--quiet")
    assert result.returncode == 2
    assert result.stderr.startswith("ferry: ")


def test_logs_as_json(tmp_path, deepseek):
    result = ferry("convert", deepseek, tmp_path / "out", "--log-format", "json", "--json")
    answer(result)
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert len(lines) >= 2
    assert all(set(line) >= {"time", "message"} for line in lines)
    assert any("multi-token prediction" in line["message"] for line in lines)


def test_plain_lines_without_a_terminal(tmp_path, deepseek):
    """No control codes, no bars, each line whole."""
    result = ferry("convert", deepseek, tmp_path / "out")
    assert "\x1b" not in result.stdout + result.stderr
    assert "\r" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("convert: 1.1 MB in ")
    assert len(result.stdout.splitlines()) == 1, "a path is not broken to fit a terminal that is not there"
    assert str(tmp_path / "out") in result.stdout


def test_an_error_as_json(tmp_path):
    """The object and the line say the same; nothing else is on standard output."""
    for name in ("convert", "plan", "inspect"):
        arguments = [tmp_path / "nowhere", tmp_path / "out"][: 2 if name == "convert" else 1]
        result = ferry_here(name, *arguments, "--json")
        error = answer(result, code=2)
        assert error == {"error": error["error"], "exit_code": 2}
        assert result.stderr == f"ferry: {error['error']}\n"


def test_clean_leaves_a_finished_checkpoint(tmp_path, converted):
    out = shutil.copytree(converted, tmp_path / "out")
    (out / ".ferry").mkdir()
    before = size_of(out)
    answer(ferry_here("clean", out, "--json"))
    assert not (out / ".ferry").exists()
    assert size_of(out) == before
    assert answer(ferry_here("compare", out, converted, "--json"))["same"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert"], "SRC"),
        (["konvert"], "konvert"),
        (["convert", "a", "b", "--bogus"], "--bogus"),
        (["convert", "a", "b", "--threads", "many"], "--threads"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, words):
    result = ferry(*arguments, "--json")
    error = answer(result, code=2)
    assert error["exit_code"] == 2
    assert result.stderr == f"ferry: {error['error']}\n"
    assert words in result.stderr
    assert "--help" in result.stderr
