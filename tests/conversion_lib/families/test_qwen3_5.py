"""Qwen 3.5: delta nets whose projections are joined, experts in one tensor or one by one, a vision tower beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conversion_lib.families.test_qwen3_next import delta_nets
from tests.support.family import Description, Engine, Leaf, Parity, Published, Refusal, Towers, Variant
from tests.support.family_tests import FamilyTests, converted
from tests.support.tiny_models import make_tiny
from tests.support.tiny_sizes import DELTA_NETS, DENSE


def config(hidden: int, moe: int, layers: int, heads: int, experts: int, value_heads: int) -> dict[str, Any]:
    kinds = [*["linear_attention"] * 3, "full_attention"] * (layers // 4)
    text = {
        "model_type": "qwen3_5_moe_text",
        **delta_nets(hidden, moe, layers, heads, experts, value_heads),
        "layer_types": kinds,
        "vocab_size": 248320,
        "mtp_num_hidden_layers": 1,
    }
    vision = {
        "model_type": "qwen3_5_moe",
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 16,
    }
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
    }


DESCRIPTION = Description(
    name="qwen3.5",
    published={
        "qwen3.5-35b-a3b": Published(config(2048, 512, 40, 16, 256, 32), 34_660_610_688),
        "qwen3.5-397b-a17b": Published(config(4096, 1024, 60, 32, 512, 64), 396_346_350_336),
    },
    leaves=(
        Leaf(
            "qwen3.5-397b-a17b",
            "layers/layer_2/attention/in_proj_qkvz/kernel",
            (4096, 15, 20480),
            "model.language_model.layers.6.linear_attn.in_proj_{qkv,z}.weight",
        ),
    ),
    refusals=(
        Refusal(
            "qwen3.5-35b-a3b",
            {"layer_types": ["linear_attention"] * 40},
            r"layer_types\[3\] is 'linear_attention', but MaxText's model has",
        ),
    ),
    tiny=DENSE
    | DELTA_NETS
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
        },
    },
    config_class="Qwen3_5MoeConfig",
    towers=Towers(
        "Qwen3_5MoeForConditionalGeneration",
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "num_position_embeddings": 4,
                "out_hidden_size": 96,
                "patch_size": 4,
            }
        },
    ),
    left_out={"visual.": "vision"},
    several_leaves=("experts.gate_up_proj",),
    own_names=True,
    parity=Parity(
        unscanned_layers=5,
        variants=(Variant("expert_by_expert", {"layers": 4, "own_names": False, "seed": 16}, names_known=False),),
        engine=Engine(layers=4, largest=1e-6),  # the norms of delta nets magnify what float32 loses
    ),
)


class TestQwen3Point5(FamilyTests):
    """The logit check: `tests/conversion_lib/logits/forward/test_delta_net.py`."""

    described = DESCRIPTION

    def test_values_as_published_and_expert_by_expert(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "fused")
        net, to = "model.language_model.layers.6.linear_attn", "layers/layer_2"
        keys, key_dim, value_dim = 2, 24, 28
        queries, keys_, values = np.split(tensor(f"{net}.in_proj_qkv.weight"), [keys * key_dim, 2 * keys * key_dim])
        parts = [queries, keys_, values, tensor(f"{net}.in_proj_z.weight")]
        by_head = np.concatenate([part.reshape(keys, -1, 96) for part in parts], axis=1)
        assert by_head.shape[1] == 2 * key_dim + 2 * 2 * value_dim
        written = leaf(f"{to}/attention/in_proj_qkvz/kernel")[:, 1]
        np.testing.assert_array_equal(written, by_head.reshape(-1, 96).T)
        both = [tensor(f"{net}.in_proj_{name}.weight").reshape(keys, -1, 96) for name in "ba"]
        written = leaf(f"{to}/attention/in_proj_ba/kernel")[:, 1]
        np.testing.assert_array_equal(written, np.concatenate(both, axis=1).reshape(-1, 96).T)

        apart = make_tiny("qwen3.5", tmp_path / "model", own_names=False)
        _, one_by_one = converted(apart, tmp_path / "apart")
        for name in ("wi_0", "wi_1", "wo"):
            path = f"layers/layer_3/mlp/routed_experts/{name}"
            np.testing.assert_array_equal(one_by_one(path), leaf(path))
