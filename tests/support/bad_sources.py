"""Sources that something is wrong with: each function writes one, and says which words the one line must have."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.checkpoints import BF16, DEEPSEEK_V3, INDEX, Tensors, random_tensors, write_checkpoint
from tests.support.sparse_checkpoints import deepseek_tensors

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
    return (str(source), "not a directory")


def source_is_a_file(source: Path) -> tuple[str, ...]:
    source.write_text("weights")
    return (str(source), "not a directory")


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
