"""Sizes that small models of several families share, as keys of their config.json. Data only."""

from __future__ import annotations

# No two sizes of one model are alike, so that swapped axes show; layers are more than one and unlike the experts.
# The head dimension 32 makes a query's scale 1/sqrt(32) inexact in bfloat16, as the real 1/sqrt(128) is.
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

# Beside the text model of the Gemma 4s.
GEMMA4_TOWERS = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
    },
    "audio_config": None,
}
