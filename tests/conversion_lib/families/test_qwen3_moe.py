"""Qwen 3 with experts in every layer."""

from __future__ import annotations

from typing import Any

from tests.support.check_tests import CheckTests
from tests.support.family import Description, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import ClassNameTests, FamilyTests
from tests.support.tiny_sizes import DENSE


def config(
    hidden: int, mlp: int, moe: int, layers: int, heads: int, kv_heads: int, experts: int = 128
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "moe_intermediate_size": moe,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "head_dim": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


DESCRIPTION = Description(
    name="qwen3_moe",
    published={
        "qwen3-30b-a3b": Published(config(2048, 6144, 768, 48, 32, 4), 30_532_122_624),
        "qwen3-235b-a22b": Published(config(4096, 12288, 1536, 94, 64, 4), 235_093_634_560),
        "qwen3-480b-a35b": Published(config(6144, 8192, 2560, 62, 96, 8, experts=160), 480_154_875_392),
    },
    leaves=(
        Leaf(
            "qwen3-30b-a3b",
            "layers/moe_block/wi_0",
            (128, 48, 2048, 768),
            "model.layers.1.mlp.experts.0.gate_proj.weight",
        ),
    ),
    refusals=(
        Refusal("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "leaves layers without experts"),
        Refusal("qwen3-30b-a3b", {"mlp_only_layers": [0]}, "leaves layers without experts"),
    ),
    tiny=DENSE
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
    config_class="Qwen3MoeConfig",
    mistake={"norm_topk_prob": False},
    parity=Parity(variants=(Variant("one_layer", {"layers": 1, "num_experts": 12, "seed": 6}, scans=(False,)),)),
)


class TestQwen3Moe(FamilyTests, ClassNameTests, CheckTests):
    described = DESCRIPTION
