"""gpt-oss: gate and up of all experts interleaved in one tensor, biases everywhere, sinks."""

from __future__ import annotations

from typing import Any

import numpy as np

from conversion_lib.conversions.convert import prepare
from conversion_lib.record import Target
from tests.support.check_tests import CheckTests
from tests.support.family import Description, Leaf, Parity, Published, Refusal
from tests.support.family_tests import FamilyTests, converted, plan_of
from tests.support.maxtext_by_hand import read_weights
from tests.support.tiny_sizes import DENSE


def config(layers: int, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }


FIVE_LAYERS = {"num_hidden_layers": 5, "layer_types": None}

DESCRIPTION = Description(
    name="gpt_oss",
    published={
        "gpt-oss-20b": Published(config(24, 32), 20_914_757_184),
        "gpt-oss-120b": Published(config(36, 128), 116_829_156_672),
    },
    leaves=(
        Leaf(
            "gpt-oss-20b",
            "layers/layers_1/GptOssMlp/wi_0",
            (32, 12, 2880, 2880),
            "model.layers.3.mlp.experts.gate_up_proj",
        ),
        Leaf("gpt-oss-20b", "layers/layers_1/GptOssAttention/sinks", (64, 12), "model.layers.3.self_attn.sinks"),
    ),
    refusals=(
        Refusal(
            "gpt-oss-20b",
            {"layer_types": ["full_attention", "sliding_attention"] * 12},
            r"layer_types\[0\] is 'full_attention', but MaxText's model has",
        ),
        Refusal("gpt-oss-20b", FIVE_LAYERS, "num_hidden_layers = 5.* from 4 on; --no-scan-layers converts them"),
        # its tensors: the layers have a place
        Refusal("gpt-oss-20b", FIVE_LAYERS, "is missing", scan_layers=False),
    ),
    tiny=DENSE
    | {
        "intermediate_size": 44,
        "num_hidden_layers": 6,
        "num_local_experts": 10,
        "num_experts_per_tok": 4,
        "sliding_window": 24,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    config_class="GptOssConfig",
    mistake={"swiglu_limit": 0.5},
    several_leaves=("gate_up_proj", "gate_up_proj_bias"),
    parity=Parity(unscanned_layers=3),
)


class TestGptOss(FamilyTests, CheckTests):
    described = DESCRIPTION

    def test_values(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out")
        experts, to = "model.layers.3.mlp.experts", "layers/layers_1/GptOssMlp"  # the second of its place in the cycle
        for index, name in enumerate(("wi_0", "wi_1")):
            np.testing.assert_array_equal(leaf(f"{to}/{name}")[:, 1], tensor(f"{experts}.gate_up_proj")[..., index::2])
            bias = tensor(f"{experts}.gate_up_proj_bias")[:, index::2]
            np.testing.assert_array_equal(leaf(f"{to}/{name}_bias")[:, 1], bias)
        np.testing.assert_array_equal(leaf(f"{to}/wo")[:, 1], tensor(f"{experts}.down_proj"))
        sinks = tensor("model.layers.3.self_attn.sinks")
        np.testing.assert_array_equal(leaf("layers/layers_1/GptOssAttention/sinks")[:, 1], sinks)

    def test_a_tensor_that_makes_two_leaves_counts_once(self, hf):
        job = prepare(hf, Target(), memory_budget=1 << 30)
        assert job.bytes_in == 2 * sum(array.size for array in read_weights(hf).values())

    def test_parts_of_a_fused_tensor_make_two_leaves(self):
        fused = "model.layers.0.mlp.experts.gate_up_proj"
        arrays = plan_of(self.described, "gpt-oss-20b").arrays
        leaves = {array.path for array in arrays for part in array.sources if part.tensor == fused}
        assert {leaf.rpartition("/")[2] for leaf in leaves} == {"wi_0", "wi_1"}
