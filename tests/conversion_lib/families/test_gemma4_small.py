"""Gemma 4 E2B and E4B: an input for each layer, keys and values that later layers share; unscanned only."""

from __future__ import annotations

import numpy as np

from conversion_lib.sources.orbax import open_orbax
from tests.conversion_lib.families.test_gemma4 import config
from tests.support.family import Description, Engine, Leaf, Parity, Published, Refusal, Towers, Variant
from tests.support.family_tests import FamilyTests, converted
from tests.support.tiny_sizes import GEMMA4, GEMMA4_TOWERS

E4B = {
    "layers": 12,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 6,
    "use_double_wide_mlp": False,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 2,
}

DESCRIPTION = Description(
    name="gemma4_small",
    published={
        "gemma4-e2b": Published(
            config(
                *(1536, 6144, 35, 8, 1, 5),
                attention_k_eq_v=False,
                hidden_size_per_layer_input=256,
                num_kv_shared_layers=20,
                use_double_wide_mlp=True,
            ),
            4_628_569_379,
        ),
        "gemma4-e4b": Published(
            config(
                *(2560, 10240, 42, 8, 2, 6),
                attention_k_eq_v=False,
                hidden_size_per_layer_input=256,
                num_kv_shared_layers=18,
                use_double_wide_mlp=False,
            ),
            7_463_013_418,
        ),
    },
    leaves=(
        Leaf(
            "gemma4-e2b",
            "layers_4/self_attention/query/kernel",
            (1536, 8, 512),
            "model.language_model.layers.4.self_attn.q_proj.weight",
            scan_layers=False,
        ),
    ),
    refusals=(
        Refusal(
            "gemma4-e2b",
            {"num_kv_shared_layers": 7},
            "num_hidden_layers = 35 and num_kv_shared_layers = 7 should both be multiples of 5",
            scan_layers=False,
        ),
    ),
    tiny=GEMMA4
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
    config_class="Gemma4Config",
    towers=Towers("Gemma4ForConditionalGeneration", GEMMA4_TOWERS),
    layouts=(False,),
    left_out={"vision_tower": "vision", "embed_vision": "vision"},
    rounds=True,
    parity=Parity(variants=(Variant("e4b", {**E4B, "seed": 14}),), engine=Engine(layers=None)),
)


class TestGemma4Small(FamilyTests):
    """The logit check: `tests/conversion_lib/logits/forward/test_delta_net.py`."""

    described = DESCRIPTION

    def test_values(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out", scan_layers=False)
        at = "model.language_model"
        wide = tensor(f"{at}.layers.9.mlp.up_proj.weight").T
        assert wide.shape[1] == 2 * 160
        np.testing.assert_array_equal(leaf("layers_9/mlp/wi_1/kernel"), wide)
        inputs = tensor(f"{at}.per_layer_model_projection.weight").T
        np.testing.assert_array_equal(leaf("per_layer_embedder/per_layer_model_projection/kernel"), inputs)
        written = {path for path in open_orbax(tmp_path / "out").tensors if "/key/" in path}
        assert written == {f"params/params/decoder/layers_{layer}/self_attention/key/kernel" for layer in range(5)}
