"""Checkpoints at their true names, shapes and dtypes, as sparse files of zeros: a few MB on disk.

The lists are written by hand from the published repositories, not from the families' tables, so that a test which
plans them tests the tables.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

DTYPE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}

Tensor = tuple[str, tuple[int, ...], str]

DEEPSEEK_V3_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V3_SHARDS = 158


def deepseek_tensors(config: dict) -> Iterator[Tensor]:
    """Every tensor of a DeepSeek V2, V3 or V3.2, with the scales, indexers and further layers that it has."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    yield "model.embed_tokens.weight", (vocab, hidden), "BF16"
    for layer in range(layers + config.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,), "BF16"
        yield f"{at}.post_attention_layernorm.weight", (hidden,), "BF16"
        yield from _latent_attention(f"{at}.self_attn", config)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{at}.mlp", config["intermediate_size"], config)
        else:
            yield from _experts(f"{at}.mlp", config)
        if layer >= layers:
            yield f"{at}.embed_tokens.weight", (vocab, hidden), "BF16"
            yield f"{at}.enorm.weight", (hidden,), "BF16"
            yield f"{at}.hnorm.weight", (hidden,), "BF16"
            yield f"{at}.eh_proj.weight", (hidden, 2 * hidden), "BF16"
            yield f"{at}.shared_head.norm.weight", (hidden,), "BF16"
            yield f"{at}.shared_head.head.weight", (vocab, hidden), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    yield "lm_head.weight", (vocab, hidden), "BF16"


def _linear(name: str, rows: int, columns: int, config: dict) -> Iterator[Tensor]:
    """fp8 with its scales where the checkpoint is quantized."""
    if "quantization_config" not in config:
        yield f"{name}.weight", (rows, columns), "BF16"
        return
    yield f"{name}.weight", (rows, columns), "F8_E4M3"
    yield f"{name}.weight_scale_inv", (math.ceil(rows / 128), math.ceil(columns / 128)), "F32"


def _latent_attention(at: str, config: dict) -> Iterator[Tensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_lora, kv_lora = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    if q_lora is None:
        yield from _linear(f"{at}.q_proj", heads * (nope + rope), hidden, config)
    else:
        yield from _linear(f"{at}.q_a_proj", q_lora, hidden, config)
        yield f"{at}.q_a_layernorm.weight", (q_lora,), "BF16"
        yield from _linear(f"{at}.q_b_proj", heads * (nope + rope), q_lora, config)
    if "index_n_heads" in config:
        index_heads, size = config["index_n_heads"], config["index_head_dim"]
        yield from _linear(f"{at}.indexer.wq_b", index_heads * size, q_lora, config)
        yield from _linear(f"{at}.indexer.wk", size, hidden, config)
        yield f"{at}.indexer.k_norm.weight", (size,), "F32"
        yield f"{at}.indexer.k_norm.bias", (size,), "F32"
        yield f"{at}.indexer.weights_proj.weight", (index_heads, hidden), "BF16"
    yield from _linear(f"{at}.kv_a_proj_with_mqa", kv_lora + rope, hidden, config)
    yield f"{at}.kv_a_layernorm.weight", (kv_lora,), "BF16"
    yield from _linear(f"{at}.kv_b_proj", heads * (nope + value), kv_lora, config)
    yield from _linear(f"{at}.o_proj", hidden, heads * value, config)


def _mlp(at: str, size: int, config: dict) -> Iterator[Tensor]:
    yield from _linear(f"{at}.gate_proj", size, config["hidden_size"], config)
    yield from _linear(f"{at}.up_proj", size, config["hidden_size"], config)
    yield from _linear(f"{at}.down_proj", config["hidden_size"], size, config)


def _experts(at: str, config: dict) -> Iterator[Tensor]:
    moe, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    yield f"{at}.gate.weight", (experts, config["hidden_size"]), "BF16"
    if config["model_type"] != "deepseek_v2":
        yield f"{at}.gate.e_score_correction_bias", (experts,), "F32"
    yield from _mlp(f"{at}.shared_experts", moe * config["n_shared_experts"], config)
    for expert in range(experts):
        yield from _mlp(f"{at}.experts.{expert}", moe, config)


def llama_tensors(config: dict) -> Iterator[Tensor]:
    """Every tensor of a Llama 3.1, or of a dense Qwen 3 where the config is one."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (vocab, hidden), "BF16"
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,), "BF16"
        yield f"{at}.post_attention_layernorm.weight", (hidden,), "BF16"
        yield f"{at}.self_attn.q_proj.weight", (q, hidden), "BF16"
        yield f"{at}.self_attn.k_proj.weight", (kv, hidden), "BF16"
        yield f"{at}.self_attn.v_proj.weight", (kv, hidden), "BF16"
        yield f"{at}.self_attn.o_proj.weight", (hidden, q), "BF16"
        if config["model_type"] == "qwen3":
            yield f"{at}.self_attn.q_norm.weight", (head_dim,), "BF16"
            yield f"{at}.self_attn.k_norm.weight", (head_dim,), "BF16"
        yield f"{at}.mlp.gate_proj.weight", (mlp, hidden), "BF16"
        yield f"{at}.mlp.up_proj.weight", (mlp, hidden), "BF16"
        yield f"{at}.mlp.down_proj.weight", (hidden, mlp), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, hidden), "BF16"


def write_sparse(directory: Path, config: dict, tensors: Iterator[Tensor], shards: int) -> Path:
    """Writes `tensors` in order over `shards` files of about equal size, all zeros, none of it on disk."""
    directory.mkdir(parents=True, exist_ok=True)
    listed = [(name, shape, dtype, math.prod(shape) * DTYPE_BYTES[dtype]) for name, shape, dtype in tensors]
    per_shard = math.ceil(sum(nbytes for *_, nbytes in listed) / shards)
    groups: list[list] = [[] for _ in range(shards)]
    position = 0
    for entry in listed:
        groups[min(position // per_shard, shards - 1)].append(entry)
        position += entry[3]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{shards:06d}.safetensors"
        _write_shard(directory / name, group)
        weight_map |= {entry[0]: name for entry in group}
    index = {"metadata": {"total_size": position}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _write_shard(path: Path, group: list) -> None:
    header, end = {}, 0
    for name, shape, dtype, nbytes in group:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        os.truncate(file.fileno(), 8 + len(text) + end)
