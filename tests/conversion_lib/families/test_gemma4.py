"""Gemma 4, 26b and 31b: two axes of layers, experts in one tensor, keys that are values."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.family import Description, Leaf, Parity, Published, Refusal, Towers, Variant
from tests.support.family_tests import FamilyTests, by_path, converted, heads, plan_of
from tests.support.tiny_sizes import GEMMA4, GEMMA4_TOWERS

VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 27,
    "head_dim": 72,
    "global_head_dim": 72,
    "patch_size": 16,
    "position_embedding_size": 10240,
    "standardize": True,
}


def config(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, cycle: int, **other: Any) -> dict[str, Any]:
    text = {
        "model_type": "gemma4_text",
        "attention_k_eq_v": True,
        "enable_moe_block": False,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": hidden,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": mlp,
        "layer_types": [*["sliding_attention"] * (cycle - 1), "full_attention"] * (layers // cycle),
        "num_attention_heads": heads,
        "num_experts": None,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_kv_shared_layers": 0,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        **other,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "audio_config": None,
        "text_config": text,
        "vision_config": VISION,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


NO_EXPERTS = {"enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None}

DESCRIPTION = Description(
    name="gemma4",
    published={
        "gemma4-26b": Published(
            config(
                *(2816, 2112, 30, 16, 8, 6),
                enable_moe_block=True,
                moe_intermediate_size=704,
                num_experts=128,
                num_global_key_value_heads=2,
                top_k_experts=8,
            ),
            25_233_141_790,
        ),
        "gemma4-31b": Published(config(5376, 21504, 60, 32, 16, 6, num_global_key_value_heads=4), 30_697_345_340),
    },
    leaves=(
        Leaf(
            "gemma4-26b",
            "scanned_blocks/global_layer/self_attention/key/kernel",
            (2816, 5, 2, 512),
            "model.language_model.layers.11.self_attn.k_proj.weight",
        ),
        Leaf(
            "gemma4-26b",
            "scanned_blocks/local_layers/mlp/moe_block/MoeBlock_0/wi_1",
            (128, 5, 5, 2816, 704),
            "model.language_model.layers.6.experts.gate_up_proj",
        ),
    ),
    refusals=(
        Refusal(
            "gemma4-26b",
            {"layer_types": ["sliding_attention"] * 30},
            r"layer_types\[5\] is 'sliding_attention', but MaxText's model has",
        ),
    ),
    tiny=GEMMA4
    | {
        "enable_moe_block": True,
        "num_experts": 10,
        "top_k_experts": 3,
        "moe_intermediate_size": 44,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    config_class="Gemma4Config",
    towers=Towers("Gemma4ForConditionalGeneration", GEMMA4_TOWERS),
    left_out={"vision_tower": "vision", "embed_vision": "vision"},
    several_leaves=("experts.gate_up_proj",),
    rounds=True,
    parity=Parity(unscanned_layers=6, variants=(Variant("dense", {"layers": 6, **NO_EXPERTS, "seed": 13}),)),
)


class TestGemma4(FamilyTests):
    """The logit check: `tests/conversion_lib/logits/forward/test_delta_net.py`."""

    described = DESCRIPTION

    def test_values(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out")
        local, to = "model.language_model.layers.8", "scanned_blocks/local_layers"  # the second block's third
        routed = f"{to}/mlp/moe_block/MoeBlock_0"
        halves = np.split(tensor(f"{local}.experts.gate_up_proj"), 2, axis=1)
        for half, name in zip(halves, ("wi_0", "wi_1"), strict=True):
            np.testing.assert_array_equal(leaf(f"{routed}/{name}")[:, 1, 2], half.transpose(0, 2, 1))
        down = tensor(f"{local}.experts.down_proj").transpose(0, 2, 1)
        np.testing.assert_array_equal(leaf(f"{routed}/wo")[:, 1, 2], down)
        np.testing.assert_array_equal(leaf(f"{to}/layer_scalar")[:, 1, 2], tensor(f"{local}.layer_scalar"))
        key = heads(tensor("model.language_model.layers.11.self_attn.k_proj.weight"), 1)
        np.testing.assert_array_equal(leaf("scanned_blocks/global_layer/self_attention/key/kernel")[:, 1], key)

    def test_norms_multiply_by_their_weight_alone_and_are_no_wider(self):
        arrays = by_path(plan_of(self.described, "gemma4-31b"))
        dtypes = {(path.endswith("/scale"), array.dtype) for path, array in arrays.items()}
        assert dtypes == {(True, "bfloat16"), (False, "bfloat16")}
