"""The loader that goes through transformers' classes: the files' own bits, or what the class makes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conversion_lib.conversions.convert import convert, prepare
from conversion_lib.core.boxes import slices
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES
from conversion_lib.models.hf_config import load_config
from conversion_lib.record import Target
from conversion_lib.sources.orbax import open_orbax
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.sources.transformers import TransformersSource
from tests.support.checkpoints import DEEPSEEK_V3, FP8, QWEN3, command, ferry_here, random_tensors, write_checkpoint
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors, write_sparse
from tests.support.tiny_models import make_tiny

BUDGET = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A family's directory, built once for the module."""
    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return built[family]

    return get


def opened(directory: Path) -> tuple[SafetensorsSource, TransformersSource]:
    stored = SafetensorsSource(directory)
    return stored, TransformersSource(stored, load_config(directory))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_has_the_files_bits(model, family):
    stored, loaded = opened(model(family))
    assert loaded.tensors == stored.tensors
    for name, info in stored.tensors.items():
        box = tuple((extent // 3, extent) for extent in info.shape)
        assert loaded.read(name).tobytes() == stored.read(name).tobytes(), name
        assert loaded.read(name, box).tobytes() == stored.read(name)[slices(box)].tobytes(), name


@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3", "qwen3.5"])
def test_conversions_are_the_same_run_with_the_same_bits(model, tmp_path, family):
    """Gemma 3's files have other names than its class, and a vision tower; DeepSeek's class holds experts as one."""
    results = {}
    for loader in ("safetensors", "transformers"):
        made = convert(model(family), tmp_path / loader, Target(), loader=loader)
        source = open_orbax(tmp_path / loader)
        results[loader] = made.fingerprint, {path: source.read(path).tobytes() for path in source.tensors}
    assert results["safetensors"] == results["transformers"]


def test_gemma_3_under_the_names_of_its_class(tmp_path):
    stored, loaded = opened(make_tiny("gemma3", tmp_path, own_names=True))
    assert "model.language_model.norm.weight" in stored.tensors
    for name in stored.tensors:
        assert loaded.read(name).tobytes() == stored.read(name).tobytes(), name


def qwen3(directory: Path, **config: object) -> Path:
    """A checkpoint whose norms are float32 and whose other tensors are bfloat16."""
    tensors = random_tensors(llama_tensors(QWEN3))
    mixed = {name: array.astype(np.float32) if "norm" in name else array for name, array in tensors.items()}
    return write_checkpoint(directory, QWEN3 | config, mixed)


def test_the_class_s_dtype_makes_another_run(tmp_path):
    """`dtype="auto"` is config.json's for every tensor: float32 norms are rounded, which otherwise keep their bits."""
    source = qwen3(tmp_path / "hf")
    stored, loaded = opened(source)
    name = "model.norm.weight"
    assert (stored.tensors[name].dtype, loaded.tensors[name].dtype) == ("float32", "bfloat16")
    np.testing.assert_array_equal(loaded.read(name), stored.read(name).astype(loaded.tensors[name].dtype))
    target = Target(save_dtype="float32")
    plans = [
        prepare(source, target, memory_budget=BUDGET, loader=loader).plan for loader in ("safetensors", "transformers")
    ]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_without_a_dtype_in_the_config_it_is_the_one_that_transformers_takes(tmp_path):
    from transformers import AutoModelForCausalLM

    source = qwen3(tmp_path / "hf", torch_dtype=None)
    _, loaded = opened(source)
    expected = str(AutoModelForCausalLM.from_pretrained(source, dtype="auto").dtype).removeprefix("torch.")
    assert {info.dtype for info in loaded.tensors.values()} == {expected}
    assert {loaded.read(name).dtype.name for name in loaded.tensors} == {expected}


def test_the_plan_says_how_much_memory_the_whole_model_takes(tmp_path):
    """Of a model whose class holds the experts of a layer as one: the process stays below what was planned."""
    plain = {key: value for key, value in DEEPSEEK_V3.items() if key != "quantization_config"}
    config = plain | {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 72, "n_group": 8}
    config |= {"num_nextn_predict_layers": 0}
    source = write_sparse(tmp_path / "hf", config, deepseek_tensors(config), shards=2)
    options = ["--memory-budget", "64MiB", "--threads", "2"]
    peaks = {}
    for loader in ("safetensors", "transformers"):
        result = ferry_here("plan", source, "--json", "--loader", loader, *options)
        peaks[loader] = json.loads(result.stdout)["peak_bytes"]
    words = command("convert", source, tmp_path / "out", "--loader", "transformers", "--quiet", *options)
    measured = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    measured += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    peak = int(subprocess.run([sys.executable, "-c", measured, *words], capture_output=True, check=True).stdout)
    assert sum(info.nbytes for info in SafetensorsSource(source).tensors.values()) > 100 << 20
    assert peaks["safetensors"] < peak < peaks["transformers"]


def test_nothing_is_loaded_for_a_plan(model, tmp_path):
    """Headers and config are enough: the files hold no values."""
    source = tmp_path / "hf"
    shutil.copytree(model("qwen3_moe"), source)
    for info in SafetensorsSource(source).tensors.values():
        with Path(info.file).open("r+b") as file:
            size = file.seek(0, 2)
            file.truncate(size - 1)
            file.truncate(size)
    plan = prepare(source, Target(), memory_budget=BUDGET, loader="transformers").plan
    assert len(plan.arrays) > 10


def test_a_quantized_checkpoint_is_refused(tmp_path):
    tensors = random_tensors(llama_tensors(QWEN3))
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(FP8)
    tensors[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = write_checkpoint(tmp_path / "hf", QWEN3 | {"quantization_config": quantization}, tensors)
    result = ferry_here("convert", source, tmp_path / "out", "--loader", "transformers")
    assert result.returncode == 2
    assert "`ferry dequantize` first" in result.stderr


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_missing_library_is_one_line(model, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    result = ferry_here("convert", model("qwen3"), tmp_path / "out", "--loader", "transformers")
    assert result.returncode == 2
    assert f"needs {library}, which is not installed: pip install 'ferry-checkpoints[check]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_code_of_the_checkpoint_is_never_run(model, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(model("qwen3"), source)
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", Target(), loader="transformers")
    assert not (tmp_path / "ran").exists()


def test_what_transformers_does_not_know_is_refused(tmp_path):
    source = qwen3(tmp_path / "hf", model_type="unheard_of")
    with pytest.raises(BadInput, match="transformers has no model_type 'unheard_of'"):
        opened(source)


def test_a_tensor_that_the_class_lacks_is_refused_when_it_is_read(tmp_path):
    tensors = random_tensors(llama_tensors(QWEN3)) | {"model.more.weight": np.zeros((2, 2), np.float32)}
    _, loaded = opened(write_checkpoint(tmp_path / "hf", QWEN3, tensors))
    with pytest.raises(BadInput, match=r"model\.more\.weight.* but in transformers' Qwen3ForCausalLM it is missing"):
        loaded.read("model.more.weight")


def test_weights_that_do_not_fill_the_class_are_refused_when_they_are_read(tmp_path):
    tensors = random_tensors(llama_tensors(QWEN3))
    del tensors["model.norm.weight"]
    _, loaded = opened(write_checkpoint(tmp_path / "hf", QWEN3, tensors))
    with pytest.raises(BadInput, match=r"are missing or have another shape: model\.norm\.weight"):
        loaded.read("lm_head.weight")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--loader", "pickle"], "--loader pickle: expected one of safetensors, transformers")],
)
def test_other_loaders_are_refused(model, tmp_path, arguments, said):
    result = ferry_here("convert", model("qwen3"), tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert said in result.stderr


def test_a_maxtext_checkpoint_has_no_loader(model, tmp_path):
    convert(model("qwen3"), tmp_path / "maxtext", Target())
    result = ferry_here("convert", tmp_path / "maxtext", tmp_path / "out", "--loader", "transformers")
    assert result.returncode == 2
    assert "--loader transformers reads a Hugging Face checkpoint" in result.stderr
