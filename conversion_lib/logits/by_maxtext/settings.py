"""The MaxText model of each architecture, and MaxText's settings for a config.json.

Standard library only: MaxText's own interpreter also imports this file, and Ferry is not installed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Kind of model -> the name of a MaxText model of that architecture. Its sizes are then overridden.
MODEL_NAMES = {
    "qwen2": "qwen2.5-7b",
    "qwen3": "qwen3-0.6b",
    "qwen3_moe": "qwen3-30b-a3b",
    "mixtral": "mixtral-8x7b",
    "gpt_oss": "gpt-oss-20b",
    "gemma2": "gemma2-2b",
    "gemma3": "gemma3-4b",
    "gemma4": "gemma4-26b",
    "gemma4_dense": "gemma4-31b",
    "gemma4_e2b": "gemma4-e2b",
    "gemma4_e4b": "gemma4-e4b",
    "qwen3_next": "qwen3-next-80b-a3b",
    "qwen3_5_moe": "qwen3.5-35b-a3b",
    "olmo3": "olmo3-7b-pt",
    "llama": "llama3.1-8b",
    "deepseek_v2": "deepseek2-16b",
    "deepseek_v3": "deepseek3-671b",
    "deepseek_v32": "deepseek3.2-671b",
}

# MaxText's key -> the key of config.json. Keys of RoPE come from `rope_parameters`.
EVERY_MODEL = {
    "base_emb_dim": "hidden_size",
    "base_num_query_heads": "num_attention_heads",
    "base_num_kv_heads": "num_key_value_heads",
    "base_mlp_dim": "intermediate_size",
    "base_num_decoder_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "normalization_layer_epsilon": "rms_norm_eps",
    "logits_via_embedding": "tie_word_embeddings",
    "rope_max_timescale": "rope_theta",
}
GROUPED_QUERY = {"head_dim": "head_dim"}
LATENT = {
    "base_moe_mlp_dim": "moe_intermediate_size",
    "first_num_dense_layers": "first_k_dense_replace",
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "shared_experts": "n_shared_experts",
    "routed_scaling_factor": "routed_scaling_factor",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
}
LOCAL = {"sliding_window_size": "sliding_window"}
EXPERTS = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
YARN = {
    "max_position_embeddings": "max_position_embeddings",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
GEMMA4 = (
    EVERY_MODEL
    | GROUPED_QUERY
    | LOCAL
    | {
        "global_head_dim": "global_layers.head_dim",
        "global_num_kv_heads": "global_layers.num_key_value_heads",
        "share_kv_projections": "attention_k_eq_v",
        "final_logits_soft_cap": "final_logit_softcapping",
        "rope_max_timescale": "full_attention.rope_theta",
        "global_rope_max_timescale": "full_attention.rope_theta",
        "global_rope_proportion": "full_attention.partial_rotary_factor",
        "local_rope_max_timescale": "sliding_attention.rope_theta",
    }
)
PER_LAYER_INPUT = {
    "hidden_size_per_layer_input": "hidden_size_per_layer_input",
    "vocab_size_per_layer_input": "vocab_size_per_layer_input",
    "num_kv_shared_layers": "num_kv_shared_layers",
    "use_double_wide_mlp": "use_double_wide_mlp",
}
DELTA_NETS = (
    EVERY_MODEL
    | GROUPED_QUERY
    | EXPERTS
    | {
        "base_mlp_dim": "moe_intermediate_size",
        "base_moe_mlp_dim": "moe_intermediate_size",
        "gdn_conv_kernel_dim": "linear_conv_kernel_dim",
        "gdn_key_head_dim": "linear_key_head_dim",
        "gdn_value_head_dim": "linear_value_head_dim",
        "gdn_num_key_heads": "linear_num_key_heads",
        "gdn_num_value_heads": "linear_num_value_heads",
        "partial_rotary_factor": "partial_rotary_factor",
    }
)
# Not in MaxText's model files: they have to be passed on the command line.
GROUPED_ROUTER = {"n_routing_groups": "n_group", "topk_routing_group": "topk_group"}
INDEXER = {
    "indexer_n_heads": "index_n_heads",
    "indexer_head_dim": "index_head_dim",
    "indexer_topk": "index_topk",
}
OVERRIDES = {
    "qwen2": EVERY_MODEL | GROUPED_QUERY,
    "qwen3": EVERY_MODEL | GROUPED_QUERY,
    "qwen3_moe": EVERY_MODEL
    | GROUPED_QUERY
    | EXPERTS
    | {
        "base_mlp_dim": "moe_intermediate_size",
        "base_moe_mlp_dim": "moe_intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
    },
    "llama": EVERY_MODEL | GROUPED_QUERY,
    "mixtral": EVERY_MODEL | GROUPED_QUERY | EXPERTS | {"base_moe_mlp_dim": "intermediate_size"},
    "gpt_oss": EVERY_MODEL | GROUPED_QUERY | EXPERTS | LOCAL | YARN | {"base_moe_mlp_dim": "intermediate_size"},
    "gemma2": EVERY_MODEL
    | GROUPED_QUERY
    | LOCAL
    | {"final_logits_soft_cap": "final_logit_softcapping", "attn_logits_soft_cap": "attn_logit_softcapping"},
    "gemma3": EVERY_MODEL
    | GROUPED_QUERY
    | LOCAL
    | {
        "rope_max_timescale": "full_attention.rope_theta",
        "local_rope_max_timescale": "sliding_attention.rope_theta",
        "rope_linear_scaling_factor": "full_attention.factor",
    },
    "gemma4": GEMMA4 | EXPERTS | {"num_experts_per_tok": "top_k_experts", "base_moe_mlp_dim": "moe_intermediate_size"},
    "gemma4_dense": GEMMA4,
    "gemma4_e2b": GEMMA4 | PER_LAYER_INPUT,
    "gemma4_e4b": GEMMA4 | PER_LAYER_INPUT,
    "qwen3_next": DELTA_NETS,
    "qwen3_5_moe": DELTA_NETS | {"mrope_section": "mrope_section"},
    # without YaRN: MaxText also applies it to layers with sliding attention, transformers does not
    "olmo3": EVERY_MODEL | GROUPED_QUERY | LOCAL | {"rope_max_timescale": "full_attention.rope_theta"},
    "deepseek_v2": EVERY_MODEL | LATENT,
    "deepseek_v3": EVERY_MODEL | LATENT | GROUPED_ROUTER,
    "deepseek_v32": EVERY_MODEL | LATENT | GROUPED_ROUTER | INDEXER,
}

SAME_AS = {"kimi_k2": "deepseek_v3"}

# float32 without shortcuts: only the order of additions may differ
EXACT = (
    "dtype=float32",
    "weight_dtype=float32",
    "matmul_precision=highest",
    "float32_qk_product=true",
    "float32_logits=true",
    "float32_gate_logits=true",
    "sparse_matmul=false",
    "megablox=false",
    "capacity_factor=-1.0",
)


def model_settings(config: Mapping[str, Any], scan: bool, ocdbt: bool = True, zarr3: bool = True) -> list[str]:
    """Makes MaxText's settings for a model and its checkpoint.

    Args:
        config: A config.json completed with the defaults of its class (`to_dict` of transformers' config).
        scan: Whether the checkpoint is scanned.
        ocdbt: Whether it is stored with OCDBT.
        zarr3: Whether its arrays are zarr3.

    Returns:
        `key=value` for MaxText's command line.

    Raises:
        ValueError: The architecture is not in the tables, or a key is missing.
    """
    values = _flat(config)
    kind = _kind(values)
    if kind not in OVERRIDES:
        raise ValueError(f"there are no MaxText settings for model_type {kind!r}, only for {', '.join(OVERRIDES)}")
    missing = [name for name in OVERRIDES[kind].values() if name not in values]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    overrides = {key: _plain(values[name]) for key, name in OVERRIDES[kind].items()}
    if values.get("first_k_dense_replace") == 0:  # MaxText requires the key, although no layer has this size
        overrides["base_mlp_dim"] = overrides["base_moe_mlp_dim"]
    if kind == "llama":  # with a tied output, MaxText otherwise divides the logits, as Gemma needs it
        overrides["normalize_embedding_logits"] = False
    if kind == "gemma2":  # a layer of MaxText is two layers
        overrides["base_num_decoder_layers"] //= 2
    return [
        f"model_name={MODEL_NAMES[kind]}",
        "override_model_config=true",
        f"scan_layers={scan}",
        f"checkpoint_storage_use_ocdbt={ocdbt}",
        f"checkpoint_storage_use_zarr3={zarr3}",
        "hardware=cpu",
        "skip_jax_distributed_system=true",
        "attention=dot_product",
        "log_config=false",
        *(f"{key}={value}" for key, value in overrides.items()),
    ]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the keys of the text model and of RoPE on one level.

    If each kind of layer has its own RoPE, the kind comes first: `full_attention.rope_theta`.
    """
    model_type = str(config.get("model_type")).removesuffix("_text")
    values = {**config, **config.get("text_config", {}), "model_type": SAME_AS.get(model_type, model_type)}
    values.setdefault("num_local_experts", values.get("num_experts"))
    values.setdefault("mrope_section", [11, 11, 10])
    if by_layer := values.get("per_layer_config"):
        own = next(iter(by_layer.values()))
        values |= {f"global_layers.{key}": own.get(key, values[key]) for key in ("head_dim", "num_key_value_heads")}
    rope = values.get("rope_parameters") or {}
    if "full_attention" in rope:
        values["full_attention.factor"] = 1.0
        return values | {f"{kind}.{key}": value for kind, keys in rope.items() for key, value in keys.items()}
    values |= rope
    if "factor" in rope:  # MaxText applies YaRN only if there are more positions than the original ones
        values["max_position_embeddings"] = rope["factor"] * rope["original_max_position_embeddings"]
    return values


def _kind(values: Mapping[str, Any]) -> str:
    """The key of the tables: the model_type, except that MaxText has four models for gemma4."""
    if values["model_type"] != "gemma4":
        return str(values["model_type"])
    if not values["hidden_size_per_layer_input"]:
        return "gemma4" if values["enable_moe_block"] else "gemma4_dense"
    cycle = values["layer_types"].index("full_attention") + 1
    return {5: "gemma4_e2b", 6: "gemma4_e4b"}.get(cycle, f"gemma4 in cycles of {cycle}")


def _plain(value: Any) -> Any:
    """The value in MaxText's types: whole numbers as int, and 0 instead of None (q_lora_rank)."""
    if value is None:
        return 0
    return int(value) if isinstance(value, float) and value.is_integer() else value
