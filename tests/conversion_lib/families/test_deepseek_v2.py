"""DeepSeek V2: latent attention, leading dense layers, shared and routed experts."""

from __future__ import annotations

from tests.support.family import GATE_ON_THE_EXPERTS_AXIS, Description, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import FamilyTests
from tests.support.sparse_checkpoints import deepseek_tensors
from tests.support.tiny_sizes import LATENT, YARN

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
    "tie_word_embeddings": False,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

DESCRIPTION = Description(
    name="deepseek_v2",
    published={"deepseek2-16b": Published(V2_LITE, 15_706_484_224, deepseek_tensors)},
    leaves=(
        Leaf(
            "deepseek2-16b",
            "moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0",
            (64, 26, 2048, 1408),
            "model.layers.2.mlp.experts.0.gate_proj.weight",
        ),
    ),
    refusals=(Refusal("deepseek2-16b", {"first_k_dense_replace": -1}, "first_k_dense_replace should be an integer"),),
    tiny=LATENT
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
    config_class="DeepseekV2Config",
    parity=Parity(
        # with the usual seed, two experts' scores for one token lie 7e-7 apart, less than float32 tells for sure
        config={"seed": 50},
        variants=(
            Variant("query_lora", {"layers": 2, "q_lora_rank": 52}, scans=(False,)),
            Variant("dense_only", {"layers": 1, "vocab_size": 509}),
        ),
        cannot_convert={True: (GATE_ON_THE_EXPERTS_AXIS, "cannot reshape array")},
    ),
)


class TestDeepseekV2(FamilyTests):
    """Every leaf, and the logit check: `test_convert.py` and `test_forward.py`, from weights laid out by hand."""

    described = DESCRIPTION
