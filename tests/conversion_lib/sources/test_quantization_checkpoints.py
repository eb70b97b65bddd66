"""Whole checkpoints in each quantized form: dequantized, converted in one pass and in two, loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.dequantize import dequantize
from conversion_lib.core.boxes import Box, whole
from conversion_lib.core.tensors import stored_bytes
from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import load_config
from conversion_lib.record import Target
from conversion_lib.sources.orbax import open_orbax, record_of
from conversion_lib.sources.quantization import dequantized
from conversion_lib.sources.safetensors import SafetensorsSource
from tests.support.checkpoints import ferry_here
from tests.support.quantized_checkpoints import FORMS, make_quantized


@pytest.fixture(scope="module", params=FORMS)
def checkpoint(request, tmp_path_factory) -> tuple[Path, Path]:
    """A quantized checkpoint, and what `dequantize` made of it."""
    source = make_quantized(request.param, tmp_path_factory.mktemp("quantized"))
    dequantize(source, source.parent / "bf16")
    return source, source.parent / "bf16"


def leaves(path: Path) -> dict[str, tuple[str, bytes]]:
    source = open_orbax(path)
    arrays = {name: source.read(name) for name in source.tensors}
    return {name: (array.dtype.name, array.tobytes()) for name, array in arrays.items()}


@pytest.mark.parametrize("target", [Target(), Target(scan_layers=False, save_dtype="float32")])
def test_one_pass_and_two_give_the_same_bits(checkpoint, tmp_path, target):
    source, plain = checkpoint
    convert(source, tmp_path / "fused", target)
    convert(plain, tmp_path / "staged", target)
    assert leaves(tmp_path / "fused") == leaves(tmp_path / "staged")


def test_the_result_is_a_checkpoint_that_transformers_loads(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    source, plain = checkpoint
    model, info = AutoModelForCausalLM.from_pretrained(plain, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert (plain / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    shards = {path.name for path in source.glob("*.safetensors")}
    assert {path.name for path in plain.glob("*.safetensors")} == shards
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    written = SafetensorsSource(plain)
    assert index["weight_map"] == {name: Path(info.file).name for name, info in written.tensors.items()}
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in written.tensors.values())


def test_plain_tensors_keep_their_bytes(checkpoint):
    source, plain = (SafetensorsSource(path) for path in checkpoint)
    both = plain.tensors.keys() & source.tensors.keys()
    kept = [name for name in both if source.tensors[name].dtype == plain.tensors[name].dtype]
    assert "model.embed_tokens.weight" in kept
    for name in kept:
        np.testing.assert_array_equal(plain.read(name).view(np.uint8), source.read(name).view(np.uint8))


def test_a_size_counts_all_that_a_weight_is_made_of(checkpoint):
    """Converting shard by shard goes by this: every stored tensor is part of one that is shown, and of one alone."""
    stored = SafetensorsSource(checkpoint[0])
    shown = dequantized(stored, load_config(checkpoint[0]))
    total = sum(stored_bytes(shown, name) for name in shown.tensors)
    expected = {name for name in stored.tensors if not name.endswith(".input_scale")}
    assert sorted(part.name for name in shown.tensors for part in shown.requires(name)) == sorted(expected)
    assert total == sum(stored_bytes(shown, name, whole(info.shape)) for name, info in shown.tensors.items())
    assert total == sum(stored.tensors[name].nbytes for name in expected)


class Watched(SafetensorsSource):
    """Notes what is read."""

    reads: set[tuple[str, Box]]

    def read(self, name, box=None):
        self.reads.add((name, box or whole(self.tensors[name].shape)))
        return super().read(name, box)


def test_a_read_takes_what_it_was_said_to_require(checkpoint):
    stored = Watched(checkpoint[0])
    shown = dequantized(stored, load_config(checkpoint[0]))
    for name, info in shown.tensors.items():
        # the second half of the slowest axis as it is stored
        slowest = info.order[0] if info.order else 0
        box = tuple((extent // 2 if axis == slowest else 0, extent) for axis, extent in enumerate(info.shape))
        required = shown.requires(name, box)
        stored.reads = set()
        shown.read(name, box)
        assert {(part.name, part.box) for part in required} == stored.reads


def test_static_scales_are_named_in_plan_and_record(tmp_path):
    source = make_quantized("fp8 by tensor", tmp_path)
    result = json.loads(ferry_here("plan", source, "--json").stdout)
    assert result["warnings"][0].startswith("activation scales: 14 tensors left out; ")
    convert(source, tmp_path / "out", Target())
    record = record_of(tmp_path / "out")
    assert record is not None
    assert record.dropped[0] == result["warnings"][0]


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "nvfp4"])
@pytest.mark.parametrize("command", ["convert", "dequantize"])
def test_other_schemes_are_refused_by_name(tmp_path, method, command):
    source = make_quantized("fp8 by channel", tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (source / "config.json").write_text(json.dumps(config))
    result = ferry_here(command, source, tmp_path / "out")
    assert result.returncode == 2
    assert f"quantization '{method}' is not supported" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_scale_that_is_no_number_leaves_nothing(tmp_path):
    source = make_quantized("mxfp4", tmp_path)
    stored = SafetensorsSource(source)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    with Path(stored.tensors[name].file).open("r+b") as file:
        file.seek(stored.offset_of(name).offset + 5)
        file.write(b"\xff")
    with pytest.raises(BadInput, match=r"down_proj_scales\[0, 2, 1\] is 255"):
        convert(source, tmp_path / "out", Target())
    assert not (tmp_path / "out/0").exists()
