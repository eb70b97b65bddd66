"""Small checkpoints in each quantized form: real names and shapes, random codes and scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conversion_lib.sources.safetensors import SafetensorsSource
from tests.support.checkpoints import Array, Tensors, write_checkpoint
from tests.support.tiny_models import make_tiny

Rng = np.random.Generator


def fp8_codes(rng: Rng, shape: tuple[int, ...]) -> Array:
    """Any e4m3 byte but NaN."""
    codes = rng.integers(0, 0x7F, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
    return codes.view(ml_dtypes.float8_e4m3fn)


def scales(rng: Rng, shape: tuple[int, ...]) -> Array:
    return rng.uniform(1e-3, 1e-2, shape).astype(ml_dtypes.bfloat16)


def fp8_by_channel(rng: Rng, name: str, shape: tuple[int, ...]) -> Tensors:
    return {name: fp8_codes(rng, shape), f"{name}_scale": scales(rng, (shape[0], 1))}


def fp8_by_tensor(rng: Rng, name: str, shape: tuple[int, ...]) -> Tensors:
    static = name.removesuffix("weight") + "input_scale"
    return {name: fp8_codes(rng, shape), f"{name}_scale": scales(rng, (1,)), static: scales(rng, (1,))}


def fp8_by_blocks(rng: Rng, name: str, shape: tuple[int, ...]) -> Tensors:
    grid = tuple(-(-extent // 128) for extent in shape)
    powers = np.exp2(rng.integers(-12, -6, grid)).astype(np.float32)
    return {name: fp8_codes(rng, shape), f"{name}_scale_inv": powers}


def int4_by_group(rng: Rng, name: str, shape: tuple[int, ...]) -> Tensors:
    rows, columns = shape
    return {
        f"{name}_packed": rng.integers(-(1 << 31), 1 << 31, (rows, columns // 8)).astype(np.int32),
        f"{name}_scale": scales(rng, (rows, columns // 32)),
        f"{name}_shape": np.array(shape, np.int64),
    }


def mxfp4(rng: Rng, name: str, shape: tuple[int, ...]) -> Tensors:
    experts, inputs, outputs = shape
    return {
        f"{name}_blocks": rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8),
        f"{name}_scales": rng.integers(115, 124, (experts, outputs, inputs // 32), np.uint8),
    }


def compressed(form: str, ignore: list[str], **arguments: Any) -> dict[str, Any]:
    """The `quantization_config` of one group."""
    group = {"targets": ["Linear"], "weights": arguments}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "quantization_status": "compressed",
    }


def _projection(name: str) -> bool:
    return name.endswith("_proj.weight") and ".layers." in name


def _routed_expert(name: str) -> bool:
    return _projection(name) and ".mlp.experts." in name


FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
KIMI_K2_THINKING_IGNORES = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]
Store = Callable[[Rng, str, tuple[int, ...]], Tensors]

FORMS: dict[str, tuple[str, dict[str, Any], Callable[[str], bool], Store, dict[str, Any]]] = {
    # as they are published: Llama and Qwen by others, DeepSeek-V3.1, Kimi K2 Thinking, gpt-oss
    "fp8 by channel": (
        "qwen3",
        {},
        _projection,
        fp8_by_channel,
        compressed("float-quantized", ["lm_head"], **FP8, strategy="channel"),
    ),
    "fp8 by tensor": (
        "llama3.1",
        {},
        _projection,
        fp8_by_tensor,
        compressed("float-quantized", ["lm_head"], **FP8, strategy="tensor"),
    ),
    "fp8 by blocks": (
        "deepseek_v3",
        {"intermediate_size": 200},
        _projection,
        fp8_by_blocks,
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    ),
    "int4 by group": (
        "deepseek_v3",
        {"moe_intermediate_size": 64},
        _routed_expert,
        int4_by_group,
        compressed("pack-quantized", KIMI_K2_THINKING_IGNORES, **INT4),
    ),
    "mxfp4": (
        "gpt_oss",
        {"intermediate_size": 64},
        lambda name: name.endswith(("gate_up_proj", "down_proj")),
        mxfp4,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    ),
}
"""family, its sizes, which tensors are quantized, how they are stored, and the config that says so."""


def make_quantized(form: str, destination: Path, seed: int = 0) -> Path:
    """Writes a small checkpoint of a form to `destination`, which it returns."""
    family, sizes, chosen, store, quantization = FORMS[form]
    plain = SafetensorsSource(make_tiny(family, destination / "plain", layers=2, **sizes))
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, info in plain.tensors.items():
        tensors |= store(rng, name, info.shape) if chosen(name) else {name: plain.read(name)}
    config = json.loads((destination / "plain/config.json").read_text()) | {"quantization_config": quantization}
    directory = write_checkpoint(destination / "quantized", config, tensors)
    (directory / "generation_config.json").write_text('{"do_sample": true}')
    return directory
