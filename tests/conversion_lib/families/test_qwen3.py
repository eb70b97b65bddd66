"""Qwen 3, dense: norms on each head's query and key."""

from __future__ import annotations

from typing import Any

from tests.support.family import Description, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import FamilyTests
from tests.support.sparse_checkpoints import llama_tensors
from tests.support.tiny_sizes import DENSE


def config(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
    }


DESCRIPTION = Description(
    name="qwen3",
    published={
        "qwen3-0.6b": Published(config(1024, 3072, 28, 16, True), 596_049_920, llama_tensors),
        "qwen3-1.7b": Published(config(2048, 6144, 28, 16, True), 1_720_574_976, llama_tensors),
        "qwen3-4b": Published(config(2560, 9728, 36, 32, True), 4_022_468_096, llama_tensors),
        "qwen3-8b": Published(config(4096, 12288, 36, 32, False), 8_190_735_360, llama_tensors),
        "qwen3-14b": Published(config(5120, 17408, 40, 40, False), 14_768_307_200, llama_tensors),
        "qwen3-32b": Published(config(5120, 25600, 64, 64, False), 32_762_123_264, llama_tensors),
    },
    leaves=(
        Leaf("qwen3-8b", "layers/self_attention/query_norm/scale", (128, 36), "model.layers.1.self_attn.q_norm.weight"),
    ),
    refusals=(Refusal("qwen3-8b", {"num_hidden_layers": 0}, "num_hidden_layers should be an integer of at least 1"),),
    tiny=DENSE
    | {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    config_class="Qwen3Config",
    parity=Parity(
        variants=(
            Variant("one_layer-untied", {"layers": 1, "tie_word_embeddings": False}),
            Variant(
                "one_kv_head-odd_vocabulary-one_shard",
                {"layers": 2, "num_key_value_heads": 1, "vocab_size": 509, "single_shard": True, "seed": 1},
            ),
        ),
        float32_source=True,
    ),
)


class TestQwen3(FamilyTests):
    """Every leaf, and the logit check: `test_convert.py` and `test_forward.py`, from weights laid out by hand."""

    described = DESCRIPTION
