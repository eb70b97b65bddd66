"""What MaxText 0.2.5's model of each architecture does with each key of config.json that changes the function.

Data only; `model.py` reads it. A key that is in no table changes nothing, or its tensors have no place and the
conversion refuses them. `tests/parity/test_model_table.py` changes each key and looks at the logits of the installed
MaxText.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conversion_lib.families import gemma2, gemma3
from conversion_lib.maxtext.entries import (
    Chooses,
    Cycle,
    Entries,
    Fixed,
    Follows,
    InWeights,
    Lacks,
    Model,
    Scaling,
    Takes,
)

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
EVERY_LAYER = ""
MOE = "moe_intermediate_size"

ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "relu": "relu"}
"""By jax's name, which MaxText takes: transformers'."""


def _activations(first: str) -> Chooses:
    names = (first, *(name for name in ACTIVATIONS if name != first))
    return Chooses("mlp_activations", lambda values: {(name, "linear"): ACTIVATIONS[name] for name in names})


SILU, GELU = _activations("silu"), _activations("gelu")

SIZES: Entries = {
    "hidden_size": Takes("base_emb_dim"),
    "num_attention_heads": Takes("base_num_query_heads"),
    "num_key_value_heads": Takes("base_num_kv_heads"),
    "num_hidden_layers": Takes("base_num_decoder_layers"),
    "vocab_size": Takes("vocab_size"),
    "intermediate_size": Takes("base_mlp_dim"),
}
EVERY_MODEL: Entries = SIZES | {
    "rms_norm_eps": Takes("normalization_layer_epsilon"),
    "tie_word_embeddings": Takes("logits_via_embedding"),
    "hidden_act": SILU,
}
GROUPED_QUERY: Entries = EVERY_MODEL | {"head_dim": Takes("head_dim"), "attention_bias": Lacks(False)}
EXPERTS: Entries = {
    "num_experts": Takes("num_experts"),
    "num_experts_per_tok": Takes("num_experts_per_tok"),
}
# MaxText takes the softmax of the chosen experts' logits, whose sum is one, whatever its `norm_topk_prob` says
NORMALIZED: Entries = {"norm_topk_prob": Fixed(True)}
LOCAL: Entries = {"sliding_window": Takes("sliding_window_size")}
NO_WINDOW: Entries = {"use_sliding_window": Lacks(False)}
EVERY_LAYER_FULL: Entries = NO_WINDOW | {"layer_types": Cycle((FULL,))}
# most norms of Gemma's layers leave MaxText's default as it is
GEMMA: Entries = (
    SIZES
    | LOCAL
    | {
        "tie_word_embeddings": Takes("logits_via_embedding"),
        "head_dim": Takes("head_dim"),
        "hidden_activation": GELU,
        "rms_norm_eps": Fixed(1e-6),
        "attention_bias": Lacks(False),
        "final_logit_softcapping": Takes("final_logits_soft_cap", {None: 0.0}),
    }
)
GEMMA4: Entries = GEMMA | {
    "global_head_dim": Takes("global_head_dim"),
    "num_global_key_value_heads": Takes("global_num_kv_heads"),
    "attention_k_eq_v": Takes("share_kv_projections"),
    "use_bidirectional_attention": Lacks(None),
}
GEMMA4_SMALL: Entries = GEMMA4 | {
    "hidden_size_per_layer_input": Takes("hidden_size_per_layer_input"),
    "vocab_size_per_layer_input": Takes("vocab_size_per_layer_input"),
    "num_kv_shared_layers": Takes("num_kv_shared_layers"),
    "use_double_wide_mlp": Takes("use_double_wide_mlp"),
}
DELTA_NETS: Entries = (
    GROUPED_QUERY
    | EXPERTS
    | {
        "moe_intermediate_size": Takes("base_moe_mlp_dim"),
        "linear_conv_kernel_dim": Takes("gdn_conv_kernel_dim"),
        "linear_key_head_dim": Takes("gdn_key_head_dim"),
        "linear_value_head_dim": Takes("gdn_value_head_dim"),
        "linear_num_key_heads": Takes("gdn_num_key_heads"),
        "linear_num_value_heads": Takes("gdn_num_value_heads"),
        "layer_types": Cycle((LINEAR, LINEAR, LINEAR, FULL)),
    }
)
DEEPSEEK: Entries = EVERY_MODEL | {
    "moe_intermediate_size": Takes("base_moe_mlp_dim"),
    "first_k_dense_replace": Takes("first_num_dense_layers"),
    "n_routed_experts": Takes("num_experts"),
    "num_experts_per_tok": Takes("num_experts_per_tok"),
    "n_shared_experts": Takes("shared_experts"),
    "routed_scaling_factor": Takes("routed_scaling_factor"),
    "q_lora_rank": Takes("q_lora_rank", {None: 0}),
    "kv_lora_rank": Takes("kv_lora_rank"),
    "qk_nope_head_dim": Takes("qk_nope_head_dim"),
    "qk_rope_head_dim": Takes("qk_rope_head_dim"),
    "v_head_dim": Takes("v_head_dim"),
    "attention_bias": Lacks(False),
    "latent_norm_eps": Follows("rms_norm_eps", original=1e-6),
}
# its file says no groups, which is -1
GROUPED_ROUTER: Entries = {
    "n_group": Takes("n_routing_groups", {1: -1}),
    "topk_group": Takes("topk_routing_group"),
    "norm_topk_prob": Fixed(True),
}


def _attention_factors(rope: Mapping[str, Any]) -> Mapping[Any, Any]:
    """YaRN's factor on cosine and sine: that of the paper (arXiv:2309.00071, section 3.4), or none."""
    return {True: yarn_temperature(rope["factor"], 1.0), False: 1.0}


def yarn_temperature(factor: float, weight: float) -> float:
    """0.1 · weight · ln(factor) + 1; 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


THETA: Entries = {"rope_theta": Takes("rope_max_timescale", whole=True)}
YARN: Entries = THETA | {
    "factor": Takes("rope_factor", whole=True),
    "original_max_position_embeddings": Takes("original_max_position_embeddings"),
    "beta_fast": Takes("beta_fast", whole=True),
    "beta_slow": Takes("beta_slow", whole=True),
    "truncate": Takes("rope_truncate"),
    "attention_factor": Chooses("rope_attention_scaling", _attention_factors),
}
PLAIN = Scaling({"rope_type": "default", "rope_linear_scaling_factor": 1.0}, THETA)
HALVES: Mapping[str, Scaling] = {
    "default": PLAIN,
    "linear": Scaling({"rope_type": "default"}, THETA | {"factor": Takes("rope_linear_scaling_factor")}),
    "yarn": Scaling({"rope_type": "yarn", "rope_interleave": False}, YARN),
}
LLAMA: Mapping[str, Scaling] = {
    "default": Scaling({"rope_type": "llama3.1", "rope_use_scale": False}, THETA),
    "llama3": Scaling(
        {"rope_type": "llama3.1", "rope_use_scale": True},
        THETA
        | {
            "factor": Fixed(8.0),
            "low_freq_factor": Fixed(1.0),
            "high_freq_factor": Fixed(4.0),
            "original_max_position_embeddings": Fixed(8192),
        },
    ),
}
PARTIAL: Mapping[str, Scaling] = {
    "default": Scaling({"rope_type": "default"}, THETA | {"partial_rotary_factor": Takes("partial_rotary_factor")})
}
# MaxText turns pairs under YaRN alone: without scaling it is YaRN by a factor of one
LATENT: Mapping[str, Scaling] = {
    "default": Scaling(
        {"rope_type": "yarn", "rope_factor": 1.0, "rope_attention_scaling": False},
        THETA | {"rope_interleave": Takes("rope_interleave")},
    ),
    "yarn": Scaling(
        {"rope_type": "yarn"},
        YARN
        | {
            "mscale_all_dim": Takes("mscale", {None: 0.0}),
            "rope_interleave": Takes("rope_interleave"),
        },
    ),
}
LOCAL_PLAIN = Scaling({}, {"rope_theta": Takes("local_rope_max_timescale", whole=True)})
GEMMA4_ROPE: Mapping[str, Mapping[str, Scaling]] = {
    SLIDING: {"default": Scaling({"local_rope_proportion": 1.0}, LOCAL_PLAIN.keys)},
    FULL: {
        "default": Scaling(
            {"global_rope_proportion": 1.0}, {"rope_theta": Takes("global_rope_max_timescale", whole=True)}
        ),
        "proportional": Scaling(
            {},
            {
                "rope_theta": Takes("global_rope_max_timescale", whole=True),
                "partial_rotary_factor": Takes("global_rope_proportion"),
                "factor": Lacks(1.0),
            },
        ),
    },
}
GEMMA4_CYCLE = Cycle((*[SLIDING] * 5, FULL))

MODELS: Mapping[str, Model] = {
    "llama": Model(
        names=("llama3.1-8b", "llama3.1-70b", "llama3.1-405b", "llama3.3-70b"),
        keys=GROUPED_QUERY | {"mlp_bias": Lacks(False)},
        rope={EVERY_LAYER: LLAMA},
    ),
    "qwen2": Model(
        names=("qwen2.5-7b", "qwen2.5-1.5b", "qwen2.5-14b"),
        keys=EVERY_MODEL | EVERY_LAYER_FULL | {"head_dim": Takes("head_dim")},
        rope={EVERY_LAYER: HALVES},
    ),
    "qwen3": Model(
        names=("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-4b-thinking-2507", "qwen3-8b", "qwen3-14b", "qwen3-32b"),
        keys=GROUPED_QUERY | EVERY_LAYER_FULL,
        rope={EVERY_LAYER: HALVES},
    ),
    "qwen3_moe": Model(
        names=("qwen3-30b-a3b", "qwen3-30b-a3b-base", "qwen3-235b-a22b", "qwen3-480b-a35b"),
        keys=GROUPED_QUERY | NO_WINDOW | EXPERTS | NORMALIZED | {"moe_intermediate_size": Takes("base_moe_mlp_dim")},
        rope={EVERY_LAYER: HALVES},
        expert_width=MOE,
    ),
    "qwen3_next": Model(
        names=("qwen3-next-80b-a3b",), keys=DELTA_NETS | NORMALIZED, rope={EVERY_LAYER: PARTIAL}, expert_width=MOE
    ),
    "qwen3_5_moe": Model(
        names=("qwen3.5-35b-a3b", "qwen3.5-397b-a17b"),
        keys=DELTA_NETS,
        rope={
            EVERY_LAYER: {"default": Scaling({}, PARTIAL["default"].keys | {"mrope_section": Takes("mrope_section")})}
        },
        expert_width=MOE,
    ),
    "mixtral": Model(
        names=("mixtral-8x7b", "mixtral-8x22b"),
        keys=GROUPED_QUERY
        | {
            "num_local_experts": Takes("num_experts"),
            "num_experts_per_tok": Takes("num_experts_per_tok"),
            "moe_intermediate_size": Takes("base_moe_mlp_dim"),
            "sliding_window": Lacks(None),
        },
        rope={EVERY_LAYER: HALVES},
        expert_width="intermediate_size",
    ),
    "gpt_oss": Model(
        names=("gpt-oss-20b", "gpt-oss-120b"),
        keys=SIZES
        | LOCAL
        | {
            "rms_norm_eps": Takes("normalization_layer_epsilon"),
            "tie_word_embeddings": Takes("logits_via_embedding"),
            "head_dim": Takes("head_dim"),
            "attention_bias": Takes("attention_bias"),
            "num_local_experts": Takes("num_experts"),
            "num_experts_per_tok": Takes("num_experts_per_tok"),
            "moe_intermediate_size": Takes("base_moe_mlp_dim"),
            "swiglu_limit": Takes("mlp_activations_limit"),
            "swiglu_alpha": Fixed(1.702),
            "layer_types": Cycle((SLIDING, FULL)),
        },
        rope={EVERY_LAYER: HALVES},
        expert_width="intermediate_size",
    ),
    "gemma2": Model(
        names=("gemma2-2b", "gemma2-9b", "gemma2-27b"),
        keys=GEMMA
        | {
            "vocab_size": Takes("vocab_size", gemma2.MAXTEXT_VOCABULARY),
            "attn_logit_softcapping": Takes("attn_logits_soft_cap", {None: 0.0}),
            "query_pre_attn_scalar": InWeights(),
            "layer_types": Cycle((SLIDING, FULL)),
            "use_bidirectional_attention": Lacks(None),
        },
        rope={EVERY_LAYER: HALVES},
        divides_logits=True,
        layers_in_one=2,
    ),
    "gemma3": Model(
        names=("gemma3-4b", "gemma3-12b", "gemma3-27b"),
        keys=GEMMA
        | {
            "vocab_size": Takes("vocab_size", gemma3.MAXTEXT_VOCABULARY),
            "query_pre_attn_scalar": Chooses(
                "model_name",
                lambda values: {
                    "gemma3-4b": values["head_dim"],
                    "gemma3-12b": values["head_dim"],
                    "gemma3-27b": values["hidden_size"] // values["num_attention_heads"],
                },
            ),
            "layer_types": Cycle((*[SLIDING] * 5, FULL)),
            "use_bidirectional_attention": Lacks(False),
        },
        rope={SLIDING: {"default": LOCAL_PLAIN}, FULL: {kind: HALVES[kind] for kind in ("default", "linear")}},
        divides_logits=True,
    ),
    "gemma4": Model(
        names=("gemma4-26b",),
        keys=GEMMA4
        | {
            "num_experts": Takes("num_experts"),
            "top_k_experts": Takes("num_experts_per_tok"),
            "moe_intermediate_size": Takes("base_moe_mlp_dim"),
            "layer_types": GEMMA4_CYCLE,
        },
        rope=GEMMA4_ROPE,
        divides_logits=True,
    ),
    "gemma4_dense": Model(
        names=("gemma4-31b",), keys=GEMMA4 | {"layer_types": GEMMA4_CYCLE}, rope=GEMMA4_ROPE, divides_logits=True
    ),
    "gemma4_e2b": Model(
        names=("gemma4-e2b",),
        keys=GEMMA4_SMALL | {"layer_types": Cycle((*[SLIDING] * 4, FULL))},
        rope=GEMMA4_ROPE,
        divides_logits=True,
    ),
    "gemma4_e4b": Model(
        names=("gemma4-e4b",), keys=GEMMA4_SMALL | {"layer_types": GEMMA4_CYCLE}, rope=GEMMA4_ROPE, divides_logits=True
    ),
    # one RoPE for all layers: with YaRN on the full ones alone, none is nearer than all
    "olmo3": Model(
        names=("olmo3-7b-pt", "olmo3-7b", "olmo3-32b"),
        keys=GROUPED_QUERY | LOCAL | {"layer_types": Cycle((SLIDING, SLIDING, SLIDING, FULL))},
        rope={SLIDING: {"default": LOCAL_PLAIN}, FULL: {"default": PLAIN}},
    ),
    "deepseek_v2": Model(
        names=("deepseek2-16b", "deepseek2-236b"),
        keys=DEEPSEEK | {"topk_method": Lacks("greedy")},
        rope={EVERY_LAYER: LATENT},
    ),
    "deepseek_v3": Model(
        names=("deepseek3-671b", "kimi-k2-1t"), keys=DEEPSEEK | GROUPED_ROUTER, rope={EVERY_LAYER: LATENT}
    ),
    "deepseek_v32": Model(
        names=("deepseek3.2-671b",),
        keys=DEEPSEEK
        | GROUPED_ROUTER
        | {
            "index_n_heads": Takes("indexer_n_heads"),
            "index_head_dim": Takes("indexer_head_dim"),
            "index_topk": Takes("indexer_topk"),
        },
        rope={EVERY_LAYER: LATENT},
    ),
}
