"""Mixtral: experts in every layer, under names of their own, and the query divided by a root."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.check_tests import CheckTests
from tests.support.family import GATE_ON_THE_EXPERTS_AXIS, Description, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import ClassNameTests, FamilyTests, converted, heads
from tests.support.tiny_sizes import DENSE


def config(hidden: int, mlp: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


DESCRIPTION = Description(
    name="mixtral",
    published={
        "mixtral-8x7b": Published(config(4096, 14336, 32, 32, 32000), 46_702_792_704),
        "mixtral-8x22b": Published(config(6144, 16384, 56, 48, 32768), 140_630_071_296),
    },
    leaves=(
        Leaf(
            "mixtral-8x22b",
            "layers/MoeBlock_0/gate/kernel",
            (6144, 56, 8),
            "model.layers.1.block_sparse_moe.gate.weight",
        ),
    ),
    refusals=tuple(
        Refusal("mixtral-8x7b", {key: value}, key, name=f"{key}={value!r}")
        for key in ("num_local_experts", "num_hidden_layers", "hidden_size")
        for value in (0, -1, "8", 8.0)
    ),
    tiny=DENSE
    | {
        "num_hidden_layers": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    config_class="MixtralConfig",
    mistake={"num_experts_per_tok": 1},
    scaled_query=True,
    rounds=True,
    parity=Parity(
        variants=(Variant("odd_vocabulary", {"layers": 2, "vocab_size": 509, "seed": 7}),),
        cannot_convert={True: (GATE_ON_THE_EXPERTS_AXIS, "Shape mismatch")},
    ),
)


class TestMixtral(FamilyTests, ClassNameTests, CheckTests):
    described = DESCRIPTION

    def test_values(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out")
        at = "model.layers.2"
        query = heads(tensor(f"{at}.self_attn.q_proj.weight"), 6) * np.float32(1 / np.sqrt(32))
        np.testing.assert_array_equal(leaf("layers/self_attention/query/kernel")[:, 2], query)
        moe = f"{at}.block_sparse_moe"
        np.testing.assert_array_equal(leaf("layers/MoeBlock_0/gate/kernel")[:, 2], tensor(f"{moe}.gate.weight").T)
        for name, to in (("w1", "wi_0"), ("w3", "wi_1"), ("w2", "wo")):
            expert = tensor(f"{moe}.experts.5.{name}.weight").T
            np.testing.assert_array_equal(leaf(f"layers/MoeBlock_0/{to}")[5, 2], expert)
