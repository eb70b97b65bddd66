"""DeepSeek V3 and V3.1, and Kimi K2: a correction bias in the router, fp8, layers for multi-token prediction."""

from __future__ import annotations

from tests.support.family import Description, Engine, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import ClassNameTests, FamilyTests
from tests.support.sparse_checkpoints import DEEPSEEK_V3_CONFIG, deepseek_tensors
from tests.support.tiny_sizes import GROUPED_ROUTER, LATENT

KIMI_K2 = {
    **DEEPSEEK_V3_CONFIG,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}

BIAS_HAS_NO_NAME = (
    "its model has the router's bias in the collection MoEBiasVar, its table of names does not have it",
    "MoEBiasVar",
)

DESCRIPTION = Description(
    name="deepseek_v3",
    published={
        "deepseek3-671b": Published(DEEPSEEK_V3_CONFIG, 671_026_419_200, deepseek_tensors),
        "kimi-k2-1t": Published(KIMI_K2, 1_026_408_232_448, deepseek_tensors),
    },
    same_sizes={"deepseek3.1-671b": "deepseek3-671b", "kimi-k2-thinking-1t": "kimi-k2-1t"},
    leaves=(
        Leaf(
            "deepseek3-671b",
            "moe_layers/self_attention/wq_a/kernel",
            (7168, 58, 1536),
            "model.layers.4.self_attn.q_a_proj.weight",
        ),
        Leaf(
            "kimi-k2-1t",
            "moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wo",
            (384, 60, 2048, 7168),
            "model.layers.2.mlp.experts.0.down_proj.weight",
        ),
    ),
    refusals=(Refusal("deepseek3-671b", {"n_routed_experts": "256"}, "n_routed_experts should be an integer"),),
    tiny=LATENT | GROUPED_ROUTER,
    config_class="DeepseekV3Config",
    left_out={"model.layers.61.": "multi-token prediction"},
    parity=Parity(
        variants=(
            Variant("more_experts-two_layers", {"layers": 2, "n_routed_experts": 48, "seed": 3}, scans=(True,)),
            Variant("no_query_lora", {"layers": 2, "q_lora_rank": None}, scans=(True,)),
            Variant("no_dense_layer", {"layers": 2, "first_k_dense_replace": 0}, scans=(True,)),
            Variant("as_kimi_k2", {"layers": 2, "n_group": 1, "topk_group": 1, "seed": 17}),
            # as many experts as MoE layers: a router bias on the wrong axes has the right shape
            Variant(
                "experts_equal_layers",
                {"layers": 7, "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
                scans=(True,),
            ),
            Variant("fp8", scans=(True,), fp8=True),
        ),
        cannot_convert={True: BIAS_HAS_NO_NAME, False: BIAS_HAS_NO_NAME},
        engine=Engine(layers=2),
    ),
)


class TestDeepseekV3(FamilyTests, ClassNameTests):
    """Every leaf, and the logit check: `test_convert.py` and `test_forward.py`, from weights laid out by hand."""

    described = DESCRIPTION
