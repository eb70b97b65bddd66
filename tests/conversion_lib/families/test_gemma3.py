"""Gemma 3, its text model: layers after the last whole cycle, three spellings of its names, a vision tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conversion_lib.core.tensors import TensorInfo
from tests.support.check_tests import CheckTests
from tests.support.family import ROUNDED_TABLE, Description, Leaf, Parity, Published, Refusal, Towers, Variant
from tests.support.family_tests import FamilyTests, by_path, converted, plan_of, published_tensors
from tests.support.tiny_sizes import GEMMA


def config(hidden: int, mlp: int, layers: int, **other: int) -> dict[str, Any]:
    """The Hub's text_config have no more than what is not the class's default."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        **other,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": text,
        "vision_config": vision,
        "torch_dtype": "bfloat16",
    }


DESCRIPTION = Description(
    name="gemma3",
    published={
        "gemma3-4b": Published(config(2560, 10240, 34), 3_880_263_168),
        "gemma3-12b": Published(config(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8), 11_766_034_176),
        "gemma3-27b": Published(
            config(5376, 21504, 62, num_attention_heads=32, num_key_value_heads=16, head_dim=128), 27_009_346_304
        ),
    },
    leaves=(
        Leaf(
            "gemma3-4b",
            "layers/layers_5/mlp/wo/kernel",
            (10240, 5, 2560),
            "language_model.model.layers.11.mlp.down_proj.weight",
        ),
    ),
    refusals=(
        Refusal(
            "gemma3-4b",
            {"layer_types": ["sliding_attention"] * 34},
            r"layer_types\[5\] is 'sliding_attention', but MaxText's model has",
        ),
        # an older file says its cycle in another key
        Refusal(
            "gemma3-4b",
            {"sliding_window_pattern": 4},
            "sliding_window_pattern = 4, but MaxText's model has cycles of 6",
        ),
    ),
    tiny=GEMMA
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
    config_class="Gemma3Config",
    mistake={"sliding_window": 25},
    towers=Towers(
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": True,
            "boi_token_index": 0,
            "eoi_token_index": 1,
            "image_token_index": 2,
        },
    ),
    left_out={"vision_tower": "vision", "multi_modal_projector": "vision"},
    norms_from_zero=True,
    rounds=True,
    parity=Parity(
        # MaxText's table has the names of transformers' class, not those of the published files
        config={"own_names": True},
        unscanned_layers=7,
        variants=(
            Variant(
                "inexact_root-remainder_alone",
                {"layers": 5, "hidden_size": 60, "own_names": True, "seed": 10},
                max_kl=ROUNDED_TABLE,
            ),
            Variant("published_names", {"layers": 6, "vocab_size": 509, "seed": 11}, names_known=False),
        ),
    ),
)


class TestGemma3(FamilyTests, CheckTests):
    described = DESCRIPTION

    def test_values_after_the_last_whole_block(self, hf, scan_layers, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out", scan_layers=scan_layers)
        at = "language_model.model.layers.13"
        to = "layers_remainder/layers_1" if scan_layers else "layers_13"
        np.testing.assert_array_equal(leaf(f"{to}/mlp/wo/kernel"), tensor(f"{at}.mlp.down_proj.weight").T)
        norm = leaf(f"{to}/self_attention/query_norm/scale")
        np.testing.assert_array_equal(norm, tensor(f"{at}.self_attn.q_norm.weight") + 1)

    def test_norms_that_are_one_plus_a_weight_are_float32_as_maxtext_writes_them(self):
        arrays = by_path(plan_of(self.described, "gemma3-4b"))
        dtypes = {(path.endswith("/scale"), array.dtype) for path, array in arrays.items()}
        assert dtypes == {(True, "float32"), (False, "bfloat16")}

    def test_the_vocabulary_is_cut_and_the_plan_says_so(self):
        plan = plan_of(self.described, "gemma3-4b")
        assert by_path(plan)["token_embedder/embedding"].shape == (262144, 2560)
        assert any("its last 64 rows are left out" in line for line in plan.dropped)
        assert not plan.exact

    def test_the_layers_after_the_last_whole_block_lie_outside_the_scan(self):
        arrays = by_path(plan_of(self.described, "gemma3-4b"))
        last = arrays["decoder/layers_remainder/layers_3/mlp/wo/kernel"]
        assert last.shape == (10240, 2560)
        assert last.sources[0].tensor == "language_model.model.layers.33.mlp.down_proj.weight"
        assert not any(path.startswith("decoder/layers_remainder/layers_4") for path in arrays)

    @pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
    def test_its_other_names(self, prefix):
        """As transformers' class has it, and as a text model alone."""
        renamed = {
            name.replace("language_model.model.", prefix): info
            for name, info in published_tensors("gemma3", "gemma3-4b").items()
            if prefix != "model." or name.startswith("language_model.")
        }
        renamed = {name: TensorInfo(name, info.shape, info.dtype, info.file) for name, info in renamed.items()}
        plan, usual = plan_of(self.described, "gemma3-4b", renamed), plan_of(self.described, "gemma3-4b")
        assert [array.shape for array in plan.arrays] == [array.shape for array in usual.arrays]
        assert {part.tensor for array in plan.arrays for part in array.sources} <= set(renamed)
