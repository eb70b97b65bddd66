"""Qwen 3 Next: three delta nets for one layer of gated attention, on two axes of layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.family import Description, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import ClassNameTests, FamilyTests, converted, heads
from tests.support.tiny_sizes import DELTA_NETS, DENSE


def delta_nets(hidden: int, moe: int, layers: int, heads: int, experts: int, value_heads: int) -> dict[str, Any]:
    """What the configs of Qwen 3 Next and Qwen 3.5 share."""
    return {
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": hidden,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "mlp_only_layers": [],
        "moe_intermediate_size": moe,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": 10,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": moe,
    }


QWEN3_NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    **delta_nets(2048, 512, 48, 16, 512, 32),
    "decoder_sparse_step": 1,
    "intermediate_size": 5120,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}

DESCRIPTION = Description(
    name="qwen3_next",
    published={"qwen3-next-80b-a3b": Published(QWEN3_NEXT_80B, 79_674_391_296)},
    leaves=(
        Leaf(
            "qwen3-next-80b-a3b",
            "layers/local_layers/mlp/routed_experts/wi_0",
            (512, 12, 3, 2048, 512),
            "model.layers.4.mlp.experts.0.gate_proj.weight",
        ),
    ),
    refusals=(
        Refusal(
            "qwen3-next-80b-a3b",
            {"full_attention_interval": 3},
            "full_attention_interval = 3, but MaxText's model has cycles of 4",
        ),
    ),
    tiny=DENSE
    | DELTA_NETS
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25}},
    config_class="Qwen3NextConfig",
    parity=Parity(
        unscanned_layers=5,
        # MaxText's own conversion has no names for layers after the last whole cycle
        variants=(
            Variant("remainder", {"layers": 7, "vocab_size": 509, "seed": 15}, scans=(True,), names_known=False),
        ),
    ),
)


class TestQwen3Next(FamilyTests, ClassNameTests):
    """The logit check: `tests/conversion_lib/logits/forward/test_delta_net.py`."""

    described = DESCRIPTION

    def test_values(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out")
        net, to = "model.layers.6.linear_attn", "layers/local_layers"  # the second block's third
        taps = tensor(f"{net}.conv1d.weight").transpose(2, 1, 0)
        np.testing.assert_array_equal(leaf(f"{to}/attention/conv1d/kernel")[:, 1, 2], taps)
        expert = tensor("model.layers.6.mlp.experts.7.up_proj.weight").T
        np.testing.assert_array_equal(leaf(f"{to}/mlp/routed_experts/wi_1")[7, 1, 2], expert)
        query = heads(tensor("model.layers.7.self_attn.q_proj.weight"), 6)
        np.testing.assert_array_equal(leaf("layers/global_layer/attention/attention/query/kernel")[:, 1], query)
