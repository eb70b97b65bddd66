"""Small models with random weights, one or more for each family that the forward pass has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny_models import make_tiny

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,  # MaxText's own
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 1024}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
}

# by name: the family, and what is other than in tests/support/tiny_models.py
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama3.1",
        {
            "vocab_size": 211,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama_tied": (
        "llama3.1",
        {
            "vocab_size": 128,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": PLAIN,
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "vocab_size": 211,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen3_one_layer": (
        "qwen3",
        {"vocab_size": 128, "num_hidden_layers": 1, "num_key_value_heads": 4, "head_dim": 16, "rope_parameters": YARN},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **MLA,
            "vocab_size": 128,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v2_grouped": (
        "deepseek_v2",
        {
            **MLA,
            "vocab_size": 128,
            "q_lora_rank": 48,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 4.0,
            "topk_method": "group_limited_greedy",
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **MLA,
            "vocab_size": 128,
            "q_lora_rank": 48,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3_plain": (
        "deepseek_v3",
        {
            **MLA,
            "vocab_size": 128,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "rope_parameters": PLAIN,
        },
    ),
    "deepseek_v32": (
        "deepseek_v32",
        {
            **MLA,
            "vocab_size": 128,
            "q_lora_rank": 48,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "index_n_heads": 16,  # with few, all may be cut to zero, and torch chooses freely among equals
            "index_head_dim": 24,
            "index_topk": 12,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
}


def build_model(name: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A model of CONFIGS, saved in bf16 (its correction bias in float32)."""
    family, sizes = CONFIGS[name]
    return make_tiny(family, directory, seed=seed, **{**COMMON, **sizes, **overrides})
