"""The checkpoints that are converted: true names, dtypes and layer shapes, fewer layers, values like weights.

Values are drawn, not repeated: codecs find in them what they find in real weights. Each checkpoint is made once and
kept; the file `made` in it says of what.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.sparse_checkpoints import (
    DEEPSEEK_V3_CONFIG,
    DEEPSEEK_V3_SHARDS,
    DTYPE_BYTES,
    Tensor,
    deepseek_tensors,
    llama_tensors,
    write_sparse,
)

MADE_NAME = "made"
VERSION = "2"
"""Rises when the same sizes would be filled with other values."""

WEIGHT_SCALE = 0.02
FP8_LARGEST = 448.0
FP8_LARGEST_SIGMAS = 4.3
"""Quantized by its largest value, a block of 16,384 normal weights reaches about so many standard deviations."""
DRAWN_AT_ONCE = 1 << 24

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Input:
    """A checkpoint to be made: `config` as in config.json; `shards` files of about equal size."""

    name: str
    config: dict[str, Any]
    shards: int

    @property
    def tensors(self) -> list[Tensor]:
        return list(_listing(self.config))

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(tensor) for tensor in self.tensors)


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 12,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 16384,
}
"""Qwen3-8B with a third of its layers and a ninth of its vocabulary: 4.9 GB."""

TINY_QWEN3 = QWEN3_8B | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}

DEEPSEEK_V3 = DEEPSEEK_V3_CONFIG | {
    "first_k_dense_replace": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "topk_group": 2,
    "vocab_size": 16384,
}
"""DeepSeek-V3's layers at their size, one dense and two of 16 experts: 2.9 GB in fp8."""

TINY_DEEPSEEK_V3 = DEEPSEEK_V3 | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "vocab_size": 2048,
}


def bf16_input(tiny: bool = False, layers: int | None = None) -> Input:
    """Qwen3 in bfloat16; `layers` instead of its own number of them."""
    config = TINY_QWEN3 if tiny else QWEN3_8B
    config = config | {"num_hidden_layers": layers or config["num_hidden_layers"]}
    return Input(f"qwen3-bf16-{config['num_hidden_layers']}-layers", config, shards=2 if tiny else 5)


def fp8_input(tiny: bool = False) -> Input:
    """DeepSeek-V3 in fp8 with a float32 scale for each 128 x 128 block."""
    return Input("deepseek-v3-fp8", TINY_DEEPSEEK_V3 if tiny else DEEPSEEK_V3, shards=2 if tiny else 4)


def make(wanted: Input, directory: Path) -> Path:
    """The checkpoint in `directory`, filled and synced there unless it is there from before."""
    description = json.dumps({"version": VERSION, "config": wanted.config, "shards": wanted.shards})
    if (directory / MADE_NAME).exists() and (directory / MADE_NAME).read_text() == description:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    groups = _shards(wanted)
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seeds = range(len(groups))
        list(pool.map(_write_shard, [directory / name for name in names], groups, seeds))
    weight_map = {tensor[0]: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": wanted.nbytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(wanted.config, indent=2))
    os.sync()
    (directory / MADE_NAME).write_text(description)
    return directory


def full_size_deepseek(work: Path) -> Path:
    """DeepSeek-V3 at its true names, shapes and dtypes, as sparse files of zeros below `work`."""
    return make_sparse(DEEPSEEK_V3_CONFIG, work / "deepseek-v3-sparse", DEEPSEEK_V3_SHARDS)


def make_sparse(config: dict[str, Any], directory: Path, shards: int) -> Path:
    """A checkpoint of zeros that takes no room, in `directory` unless it is there from before."""
    if not (directory / "config.json").exists():  # what is written last
        write_sparse(directory, config, _listing(config), shards)
    return directory


def _listing(config: dict[str, Any]) -> Iterator[Tensor]:
    return deepseek_tensors(config) if config["model_type"] == "deepseek_v3" else llama_tensors(config)


def _nbytes(tensor: Tensor) -> int:
    _, shape, dtype = tensor
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _shards(wanted: Input) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[] for _ in range(wanted.shards)]
    position = 0
    for tensor in wanted.tensors:
        groups[position * wanted.shards // wanted.nbytes].append(tensor)
        position += _nbytes(tensor)
    return groups


def _write_shard(path: Path, group: list[Tensor], seed: int) -> None:
    header: dict[str, Any] = {}
    end = 0
    for tensor in group:
        name, shape, dtype = tensor
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + _nbytes(tensor)]}
        end += _nbytes(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, dtype in group:
            left, draw = math.prod(shape), _draw_for(name, dtype)
            while left:
                count = min(left, DRAWN_AT_ONCE)
                file.write(draw(rng, count).data)
                left -= count


def _draw_for(name: str, dtype: str) -> Callable[[np.random.Generator, int], Array]:
    if dtype == "F8_E4M3":
        return _fp8
    if dtype == "BF16":
        return _norms if name.endswith("norm.weight") else _bf16
    return _scales if name.endswith("_scale_inv") else _float32


def _bf16(rng: np.random.Generator, count: int) -> Array:
    """Normal values; the upper half of a float32 is a bfloat16."""
    values = rng.standard_normal(count, np.float32)
    values *= WEIGHT_SCALE
    return np.ascontiguousarray(values.view(np.uint16)[1::2])


def _norms(rng: np.random.Generator, count: int) -> Array:
    """About 1, as trained ones: with norms next to zero all logits would be alike, whatever the rest computes."""
    values = 1 + WEIGHT_SCALE * rng.standard_normal(count, np.float32)
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def _float32(rng: np.random.Generator, count: int) -> Array:
    return rng.standard_normal(count, np.float32)


def _scales(rng: np.random.Generator, count: int) -> Array:
    """What divides a block's largest weight by the largest fp8 value; it varies from block to block."""
    usual = WEIGHT_SCALE * FP8_LARGEST_SIGMAS / FP8_LARGEST
    return (usual * rng.uniform(0.7, 1.4, count)).astype(np.float32)


def _fp8(rng: np.random.Generator, count: int) -> Array:
    """Normal values over their block's largest, as fp8: drawn by 65,536 quantiles."""
    return FP8_QUANTILES.take(rng.integers(0, 1 << 16, count, np.uint16))


def _fp8_quantiles() -> Array:
    normal = NormalDist(0, FP8_LARGEST / FP8_LARGEST_SIGMAS)
    values = [normal.inv_cdf((step + 0.5) / (1 << 16)) for step in range(1 << 16)]
    return np.clip(values, -FP8_LARGEST, FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


FP8_QUANTILES = _fp8_quantiles()
