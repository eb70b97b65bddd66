"""The demo's checkpoint: real names, real storage, ragged edges."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conversion_lib.core.dtypes import SAFETENSORS_DTYPES, numpy_dtype
from conversion_lib.demo.tiny_checkpoint import BLOCK, CONFIG, make_tiny_deepseek_v3, quantize_block_fp8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_deepseek_v3(tmp_path_factory.mktemp("tiny") / "tiny")


def read_shard(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file by its specification: header length, JSON header, data."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype = numpy_dtype(SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = np.frombuffer(content[start + first : start + last], dtype).reshape(entry["shape"])
    return tensors


def read_all(directory: Path) -> dict[str, np.ndarray]:
    return {name: t for shard in sorted(directory.glob("*.safetensors")) for name, t in read_shard(shard).items()}


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    rows, columns = values.shape
    spread = np.repeat(np.repeat(scales, BLOCK, 0), BLOCK, 1)[:rows, :columns]
    return (values.astype(np.float32) * spread).astype(ml_dtypes.bfloat16)


def test_storage_is_the_real_one(tiny: Path) -> None:
    tensors = read_all(tiny)
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(set(index["weight_map"].values())) >= 4
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            values = tensors[name.removesuffix("_scale_inv")]
            assert tensor.dtype == np.float32
            assert tensor.shape == tuple(math.ceil(size / BLOCK) for size in values.shape)
        elif f"{name}_scale_inv" in tensors:
            assert tensor.dtype == ml_dtypes.float8_e4m3fn
            assert np.isfinite(tensor.astype(np.float32)).all()
        elif name.endswith("e_score_correction_bias"):
            assert tensor.dtype == np.float32
        else:
            assert tensor.dtype == ml_dtypes.bfloat16
    quantized = {n.removesuffix("_scale_inv"): t for n, t in tensors.items() if n.endswith("_scale_inv")}
    ragged = {(t.shape[0] % BLOCK > 0, t.shape[1] % BLOCK > 0) for n, t in tensors.items() if n in quantized}
    assert ragged == {(False, False), (True, False), (False, True), (True, True)}
    plain = [n for n in tensors if n.endswith("proj.weight") and n not in quantized]
    assert plain == ["model.layers.4.eh_proj.weight"]


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    again = make_tiny_deepseek_v3(tmp_path / "again")
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in tiny.iterdir())
    assert all(p.read_bytes() == (tiny / p.name).read_bytes() for p in again.iterdir())
    other = make_tiny_deepseek_v3(tmp_path / "other", seed=1)
    shard = "model-00001-of-00004.safetensors"
    assert (other / shard).read_bytes() != (tiny / shard).read_bytes()


def test_quantize_keeps_within_fp8_precision() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((200, 300)).astype(np.float32)
    weight[:128, :128] = 0
    values, scales = quantize_block_fp8(weight)
    assert (values.shape, values.dtype) == ((200, 300), ml_dtypes.float8_e4m3fn)
    assert (scales.shape, scales.dtype) == ((2, 3), np.float32)
    assert np.all(values[:128, :128] == 0)
    back = values.astype(np.float32) * np.repeat(np.repeat(scales, BLOCK, 0), BLOCK, 1)[:200, :300]
    # three mantissa bits: half a step of 1/8; below the smallest normal number the step is 2**-9
    error = np.abs(back - weight)
    assert np.all(error <= np.maximum(np.abs(weight) / 16 * 1.001, scales.max() * 2**-10 * 1.001))
    assert np.abs(values.astype(np.float32)).max() == 448


def test_transformers_takes_every_weight(tiny: Path, tmp_path: Path) -> None:
    """The names are what DeepseekV3ForCausalLM expects; only the MTP layer is left over."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    tensors = read_all(tiny)
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scales = tensors.get(f"{name}_scale_inv")
        plain = tensor if scales is None else dequantize(tensor, scales)
        if plain.dtype == ml_dtypes.bfloat16:
            weights[name] = torch.from_numpy(plain.view(np.int16).copy()).view(torch.bfloat16)
        else:
            weights[name] = torch.from_numpy(plain.copy())
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny / name, tmp_path)

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith("model.layers.4.") for key in info["unexpected_keys"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= CONFIG["vocab_size"]
    text = "The ferry reaches the southern shore. 渡し船"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == CONFIG["bos_token_id"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], CONFIG["vocab_size"])
    assert torch.isfinite(logits).all()
    assert logits.float().std() > 0.1
