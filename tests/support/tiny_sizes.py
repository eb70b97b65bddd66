"""The sizes of the small models in `tests/support/tiny_models.py`, as keys of their config.json. Data only."""

from __future__ import annotations

from typing import Any

# No two sizes of one model are alike, so that swapped axes show; layers are more than one and unlike the experts.
DENSE = {
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
# MaxText rounds a tied table to bfloat16 for the logits; the root of 64 is one that loses nothing by it.
GEMMA = DENSE | {"hidden_size": 64, "num_attention_heads": 4}
GEMMA4 = GEMMA | {
    "num_hidden_layers": 12,
    "global_head_dim": 48,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "sliding_window": 24,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
    },
}
DELTA_NETS = {
    "num_hidden_layers": 8,
    "moe_intermediate_size": 44,
    "shared_expert_intermediate_size": 44,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 28,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LATENT = {
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 28,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 10240,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 256,  # fewer than a long prompt has tokens
}
GROUPED_ROUTER = {
    "q_lora_rank": 52,
    "n_routed_experts": 20,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
INDEXER = {"index_n_heads": 12, "index_head_dim": 24, "index_topk": 8}

# The head dimension 32 makes Llama's query scale 1/sqrt(32) inexact in bfloat16, as the real 1/sqrt(128) is.
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": DENSE
    | {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama3.1": DENSE
    | {
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2.5": DENSE
    | {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3_moe": DENSE
    | {
        "moe_intermediate_size": 44,
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
    },
    "mixtral": DENSE
    | {
        "num_hidden_layers": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gpt_oss": DENSE
    | {
        "intermediate_size": 44,
        "num_hidden_layers": 6,
        "num_local_experts": 10,
        "num_experts_per_tok": 4,
        "sliding_window": 24,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "gemma2": GEMMA
    | {
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 32,
        "sliding_window": 24,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gemma3": GEMMA
    | {
        "num_hidden_layers": 14,
        "query_pre_attn_scalar": 32,
        "sliding_window": 24,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    },
    "gemma4": GEMMA4
    | {
        "enable_moe_block": True,
        "num_experts": 10,
        "top_k_experts": 3,
        "moe_intermediate_size": 44,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "gemma4_small": GEMMA4
    | {
        "num_hidden_layers": 10,
        "num_key_value_heads": 1,
        "enable_moe_block": False,
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 20,
        "vocab_size_per_layer_input": 500,
        "num_kv_shared_layers": 5,
        "use_double_wide_mlp": True,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 2,
    },
    "qwen3_next": DENSE
    | DELTA_NETS
    | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
    },
    "qwen3.5": DENSE
    | DELTA_NETS
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
        },
    },
    "olmo3": DENSE
    | {
        "num_hidden_layers": 8,
        "sliding_window": 24,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 500000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "deepseek_v2": LATENT
    | {
        "q_lora_rank": None,
        "n_routed_experts": 10,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": LATENT | GROUPED_ROUTER,
    "deepseek_v32": LATENT | GROUPED_ROUTER | INDEXER,
}

# Gemma 3's, Gemma 4's and Qwen 3.5's checkpoints hold a vision tower as well.
QWEN3_5_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 4,
    "out_hidden_size": 96,
    "patch_size": 4,
}
GEMMA4_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
