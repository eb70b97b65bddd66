"""Llama 3: halves of query and key interleaved, and the query divided by a root."""

from __future__ import annotations

from typing import Any

from conversion_lib.conversions.convert import convert
from conversion_lib.logits.check import Options, run_check
from conversion_lib.record import Target
from tests.support.family import Description, Engine, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import FamilyTests
from tests.support.sparse_checkpoints import llama_tensors
from tests.support.tiny_models import make_tiny
from tests.support.tiny_sizes import DENSE


def llama31(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    """As on the Hub: neither head_dim nor tie_word_embeddings is always there."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }


def llama32(hidden: int, layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


LLAMA33_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

DESCRIPTION = Description(
    name="llama3.1",
    published={
        "llama3.1-8b": Published(llama31(4096, 14336, 32, 32), 8_030_261_248, llama_tensors),
        "llama3.1-70b": Published(llama31(8192, 28672, 80, 64), 70_553_706_496, llama_tensors),
        "llama3.1-405b": Published(llama31(16384, 53248, 126, 128), 405_853_388_800, llama_tensors),
        "llama3.2-1b": Published(llama32(2048, 16, 32, 64), 1_235_814_400),
        "llama3.2-3b": Published(llama32(3072, 28, 24, 128), 3_212_749_824),
        "llama3.3-70b": Published(LLAMA33_70B, 70_553_706_496),
    },
    leaves=(
        Leaf(
            "llama3.1-405b",
            "layers/self_attention/key/kernel",
            (16384, 126, 8, 128),
            "model.layers.1.self_attn.k_proj.weight",
        ),
    ),
    refusals=(Refusal("llama3.1-8b", {"vocab_size": "128256"}, "vocab_size should be an integer"),),
    tiny=DENSE
    | {
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    config_class="LlamaConfig",
    scaled_query=True,
    rounds=True,
    parity=Parity(
        variants=(
            Variant(
                "one_layer-one_kv_head-odd_vocabulary",
                {"layers": 1, "num_key_value_heads": 1, "vocab_size": 509, "seed": 2},
            ),
            Variant("tied-as_llama3.2", {"layers": 3, "tie_word_embeddings": True, "seed": 18}),
        ),
        float32_source=True,
        engine=Engine(layers=2),
    ),
)


class TestLlama3(FamilyTests):
    """Every leaf, and the logit check: `test_convert.py` and `test_forward.py`, from weights laid out by hand."""

    described = DESCRIPTION

    def test_llama_3_2_passes_with_what_maxtext_has_otherwise(self, tmp_path):
        """MaxText's code has one RoPE factor, 8."""
        scaling = DESCRIPTION.tiny["rope_parameters"] | {"factor": 32.0}
        hf = make_tiny("llama3.1", tmp_path / "hf", layers=2, rope_parameters=scaling, max_position_embeddings=131072)
        convert(hf, tmp_path / "ckpt", Target(save_dtype="float32"))
        result = run_check(tmp_path / "ckpt", hf, options=Options(tokens=40))
        assert (result.verdict, result.weights, result.model.verdict) == ("pass", "pass", "pass")
        assert result.max_kl < 1e-9 < 1e-7 < result.model.max_kl < 1e-3
        line = "Right weights; MaxText's model has RoPE factor 8, the original 32: largest KL of a token"
        page = (tmp_path / "ckpt" / "report" / "report.html").read_text()
        assert line in result.reason and line in page.replace("&#39;", "'")
        strict = run_check(tmp_path / "ckpt", hf, options=Options(tokens=40, max_model_kl=1e-9))
        assert (strict.verdict, strict.weights, strict.model.verdict) == ("fail", "pass", "fail")
        assert "--max-model-kl" in strict.reason
