"""A Hugging Face checkpoint's weights in MaxText's layout, written down by hand.

It follows what MaxText's own converter writes, in plain numpy, and shares nothing with the package: tests of the
conversion and of the forward pass hold against it where MaxText itself is not at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

BF16 = ml_dtypes.bfloat16


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face directory, as stored."""
    weights = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return weights


def maxtext_leaves(
    directory: Path, *, scanned: bool, dtype: Any = np.float32, bias_order: str = "layers_first"
) -> dict[str, np.ndarray]:
    """The weights of a Hugging Face directory as MaxText's leaves, by path below params/params."""
    config = json.loads((directory / "config.json").read_text())
    weights = read_weights(directory)
    layers = [_layer(weights, config, index) for index in range(config["num_hidden_layers"])]
    dense = config["first_k_dense_replace"] if config["model_type"].startswith("deepseek") else None
    stacks = {"layers": layers} if dense is None else {"dense_layers": layers[:dense], "moe_layers": layers[dense:]}
    leaves = {
        "token_embedder/embedding": weights["model.embed_tokens.weight"],
        "decoder/decoder_norm/scale": weights["model.norm.weight"],
    }
    if not config.get("tie_word_embeddings"):
        leaves["decoder/logits_dense/kernel"] = weights["lm_head.weight"].T
    for stack, members in stacks.items():
        if not scanned:
            leaves |= {f"decoder/{stack}_{i}/{leaf}": a for i, layer in enumerate(members) for leaf, a in layer.items()}
            continue
        for leaf in members[0] if members else ():
            by_layer = leaf.endswith("gate/bias") and bias_order == "layers_first"
            leaves[f"decoder/{stack}/{leaf}"] = np.stack([m[leaf] for m in members], 0 if by_layer else 1)
    # the router's correction bias stays float32 whatever the rest is saved as
    return {
        leaf: np.ascontiguousarray(array.astype(np.float32 if leaf.endswith("gate/bias") else dtype))
        for leaf, array in leaves.items()
    }


def _layer(weights: dict[str, np.ndarray], config: dict[str, Any], index: int) -> dict[str, np.ndarray]:
    def get(name: str) -> np.ndarray:
        return weights[f"model.layers.{index}.{name}"]

    leaves = {
        "pre_self_attention_layer_norm/scale": get("input_layernorm.weight"),
        "post_self_attention_layer_norm/scale": get("post_attention_layernorm.weight"),
    }
    deepseek = config["model_type"].startswith("deepseek")
    leaves |= _latent(get, config) if deepseek else _grouped(get, config)
    if not deepseek or index < config["first_k_dense_replace"]:
        return leaves | _mlp(get, "mlp", "mlp")
    block = "DeepSeekMoeBlock_0"
    leaves |= _mlp(get, "mlp.shared_experts", f"{block}/shared_experts")
    leaves[f"{block}/MoeBlock_0/gate/kernel"] = get("mlp.gate.weight").T
    if config["model_type"] != "deepseek_v2":
        leaves[f"{block}/MoeBlock_0/gate/bias"] = get("mlp.gate.e_score_correction_bias")
    for mine, theirs in (("wi_0", "gate_proj"), ("wi_1", "up_proj"), ("wo", "down_proj")):
        experts = [get(f"mlp.experts.{e}.{theirs}.weight").T for e in range(config["n_routed_experts"])]
        leaves[f"{block}/MoeBlock_0/{mine}"] = np.stack(experts)
    return leaves


def _mlp(get: Any, theirs: str, mine: str) -> dict[str, np.ndarray]:
    names = (("wi_0", "gate_proj"), ("wi_1", "up_proj"), ("wo", "down_proj"))
    return {f"{mine}/{a}/kernel": get(f"{theirs}.{b}.weight").T for a, b in names}


def _heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """(heads * dim, in) -> (in, heads, dim)"""
    return weight.T.reshape(weight.shape[1], heads, -1)


def to_pairs(array: np.ndarray) -> np.ndarray:
    """The last axis from two halves to neighbours: 0, d/2, 1, d/2 + 1, ..."""
    half = array.shape[-1] // 2
    return np.stack([array[..., :half], array[..., half:]], axis=-1).reshape(array.shape)


def _grouped(get: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    query = _heads(get("self_attn.q_proj.weight"), heads)
    key = _heads(get("self_attn.k_proj.weight"), kv_heads)
    dim = query.shape[-1]
    leaves = {
        "self_attention/value/kernel": _heads(get("self_attn.v_proj.weight"), kv_heads),
        "self_attention/out/kernel": get("self_attn.o_proj.weight").T.reshape(heads, dim, -1),
    }
    if config["model_type"] == "qwen3":
        leaves["self_attention/query_norm/scale"] = get("self_attn.q_norm.weight")
        leaves["self_attention/key_norm/scale"] = get("self_attn.k_norm.weight")
    else:
        query = to_pairs(query).astype(np.float32) * np.float32(1 / np.sqrt(dim))
        key = to_pairs(key)
    return leaves | {"self_attention/query/kernel": query, "self_attention/key/kernel": key}


def _latent(get: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    heads = config["num_attention_heads"]
    leaves = {
        "self_attention/wkv_a/kernel": get("self_attn.kv_a_proj_with_mqa.weight").T,
        "self_attention/kv_norm/scale": get("self_attn.kv_a_layernorm.weight"),
        "self_attention/wkv_b/kernel": _heads(get("self_attn.kv_b_proj.weight"), heads),
        "self_attention/out/kernel": get("self_attn.o_proj.weight").T.reshape(heads, config["v_head_dim"], -1),
    }
    if config["q_lora_rank"] is None:
        leaves["self_attention/query/kernel"] = _heads(get("self_attn.q_proj.weight"), heads)
    else:
        leaves["self_attention/wq_a/kernel"] = get("self_attn.q_a_proj.weight").T
        leaves["self_attention/q_norm/scale"] = get("self_attn.q_a_layernorm.weight")
        leaves["self_attention/wq_b/kernel"] = _heads(get("self_attn.q_b_proj.weight"), heads)
    if config["model_type"] == "deepseek_v32":
        prefix = "self_attention/indexer"
        leaves[f"{prefix}/wq_b/kernel"] = _heads(get("self_attn.indexer.wq_b.weight"), config["index_n_heads"])
        leaves[f"{prefix}/wk/kernel"] = get("self_attn.indexer.wk.weight").T
        leaves[f"{prefix}/k_norm/scale"] = get("self_attn.indexer.k_norm.weight")
        leaves[f"{prefix}/k_norm/bias"] = get("self_attn.indexer.k_norm.bias")
        leaves[f"{prefix}/weights_proj/kernel"] = get("self_attn.indexer.weights_proj.weight").T
    return leaves
