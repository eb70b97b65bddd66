"""Gemma 2: a layer of MaxText's is a pair of ours; embedding, query and norms are stored in other values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conversion_lib.plan.value_ops import Scale
from conversion_lib.sources.orbax import open_orbax
from tests.support.check_tests import CheckTests
from tests.support.family import ROUNDED_TABLE, Description, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import FamilyTests, by_path, converted, heads, plan_of
from tests.support.tiny_sizes import GEMMA


def config(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, root: int) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": root,
        "vocab_size": 256000,
        "torch_dtype": "float32",
    }


DESCRIPTION = Description(
    name="gemma2",
    published={
        "gemma2-2b": Published(config(2304, 9216, 26, 8, 4, 256, 256), 2_614_341_888),
        "gemma2-9b": Published(config(3584, 14336, 42, 16, 8, 256, 256), 9_241_705_984),
        "gemma2-27b": Published(config(4608, 36864, 46, 32, 16, 128, 144), 27_227_128_320),
    },
    leaves=(
        Leaf(
            "gemma2-9b",
            "layers/self_attention_global/query/kernel",
            (3584, 21, 16, 256),
            "model.layers.3.self_attn.q_proj.weight",
        ),
    ),
    refusals=(
        Refusal(
            "gemma2-2b",
            {"layer_types": ["sliding_attention", "full_attention"] * 12 + ["full_attention"] * 2},
            r"layer_types\[24\] is 'full_attention', but MaxText's model has",
        ),
        # an odd layer has no place at all
        *(
            Refusal("gemma2-2b", {"num_hidden_layers": 5}, r"has no place for layers from 4 on$", scan_layers=scan)
            for scan in (True, False)
        ),
    ),
    tiny=GEMMA
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
    config_class="Gemma2Config",
    mistake={"final_logit_softcapping": 1.0},
    norms_from_zero=True,
    scaled_query=True,
    rounds=True,
    parity=Parity(
        unscanned_layers=2,
        variants=(
            Variant(
                "inexact_root",
                {"layers": 2, "hidden_size": 60, "num_key_value_heads": 1, "seed": 9},
                max_kl=ROUNDED_TABLE,
            ),
            # MaxText's own conversion divides by the root of head_dim, whatever the config says
            Variant("query_scale", {"layers": 2, "query_pre_attn_scalar": 36, "seed": 12}, names_known=False),
        ),
    ),
)


class TestGemma2(FamilyTests, CheckTests):
    described = DESCRIPTION

    def test_values_in_bfloat16(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out", save_dtype="bfloat16")
        norm = leaf("layers/pre_ffw_norm_global/scale")
        np.testing.assert_array_equal(norm[:, 1], tensor("model.layers.3.pre_feedforward_layernorm.weight") + 1)
        query = heads(tensor("model.layers.2.self_attn.q_proj.weight"), 4) * np.float32(1 / np.sqrt(32))
        written = leaf("layers/self_attention_local/query/kernel")[:, 1]
        np.testing.assert_array_equal(written.view(np.uint16), query.astype(ml_dtypes.bfloat16).view(np.uint16))
        table = open_orbax(tmp_path / "out").read("params/params/token_embedder/embedding")
        np.testing.assert_array_equal(table.astype(np.float32), 8 * tensor("model.embed_tokens.weight"))

    @pytest.mark.parametrize(("name", "root"), [("gemma2-9b", 256), ("gemma2-27b", 144)])
    def test_the_query_is_divided_by_the_root_that_the_config_names(self, name, root):
        """Not head_dim's, which in 27B is 128."""
        ops = by_path(plan_of(self.described, name))["decoder/layers/self_attention_local/query/kernel"].ops
        assert [op for op in ops if isinstance(op, Scale)] == [Scale(root)]

    def test_norms_that_are_one_plus_a_weight_are_float32_as_maxtext_writes_them(self):
        arrays = by_path(plan_of(self.described, "gemma2-2b"))
        dtypes = {(path.endswith("/scale"), array.dtype) for path, array in arrays.items()}
        assert dtypes == {(True, "float32"), (False, "bfloat16")}

    def test_the_vocabulary_is_padded_and_the_plan_says_so(self):
        plan = plan_of(self.described, "gemma2-2b")
        assert by_path(plan)["token_embedder/embedding"].shape == (256128, 2304)
        assert any("128 rows of zeros" in line for line in plan.dropped)
