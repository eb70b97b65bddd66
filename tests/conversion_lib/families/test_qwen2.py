"""Qwen 2.5: biases on query, key and value."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.check_tests import CheckTests
from tests.support.family import Description, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import FamilyTests, converted
from tests.support.tiny_sizes import DENSE


def config(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    }


DESCRIPTION = Description(
    name="qwen2.5",
    published={
        "qwen2.5-1.5b": Published(config(1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
        "qwen2.5-7b": Published(config(3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
        "qwen2.5-14b": Published(config(5120, 13824, 48, 40, 8, 152064, False), 14_770_033_664),
    },
    leaves=(
        Leaf("qwen2.5-7b", "layers/self_attention/key/bias", (4, 28, 128), "model.layers.1.self_attn.k_proj.bias"),
    ),
    refusals=(Refusal("qwen2.5-7b", {"num_key_value_heads": "4"}, "num_key_value_heads should be an integer"),),
    tiny=DENSE
    | {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    config_class="Qwen2Config",
    mistake={"rms_norm_eps": 1e-2},
    parity=Parity(variants=(Variant("tied-one_layer", {"layers": 1, "tie_word_embeddings": True, "seed": 5}),)),
)


class TestQwen2(FamilyTests, CheckTests):
    described = DESCRIPTION

    def test_values(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out")
        bias = tensor("model.layers.3.self_attn.k_proj.bias").reshape(2, 32)
        np.testing.assert_array_equal(leaf("layers/self_attention/key/bias")[:, 3], bias)
