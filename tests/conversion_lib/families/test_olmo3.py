"""Olmo 3: norms after attention and MLP alone, over all heads of query and key at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from conversion_lib.conversions.convert import convert
from conversion_lib.logits.check import Options, run_check
from conversion_lib.record import Target
from tests.support.check_tests import CheckTests
from tests.support.family import Changed, Description, Engine, Leaf, Parity, Published, Refusal
from tests.support.family_tests import FamilyTests, converted
from tests.support.tiny_models import make_tiny
from tests.support.tiny_sizes import DENSE


def config(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 100278,
        "tie_word_embeddings": False,
        "rope_theta": 500000,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
    }


SEVEN_CYCLES_AND_FOUR = [*["sliding_attention"] * 3, "full_attention"] * 7 + ["sliding_attention"] * 4
SEVEN_LAYERS = {"num_hidden_layers": 7, "layer_types": None}

PLAIN = {"rope_type": "default", "rope_theta": 777.0}
YARN = {"rope_type": "yarn", "rope_theta": 777.0, "factor": 8.0, "original_max_position_embeddings": 64}

DESCRIPTION = Description(
    name="olmo3",
    published={
        "olmo3-7b": Published(config(4096, 11008, 32, 32, 32), 7_298_011_136),
        "olmo3-32b": Published(config(5120, 27648, 64, 40, 8), 32_233_522_176),
    },
    leaves=(
        Leaf(
            "olmo3-32b",
            "layers/layers_2/attention/key/kernel",
            (5120, 16, 8, 128),
            "model.layers.6.self_attn.k_proj.weight",
        ),
    ),
    refusals=(
        Refusal(
            "olmo3-7b",
            {"layer_types": SEVEN_CYCLES_AND_FOUR},
            r"layer_types\[31\] is 'sliding_attention', but MaxText's model has",
        ),
        Refusal(
            "olmo3-7b",
            SEVEN_LAYERS,
            "num_hidden_layers = 7.* from 4 on; --no-scan-layers converts them",
        ),
        # its tensors: the layers have a place
        Refusal("olmo3-7b", SEVEN_LAYERS, "is missing", scan_layers=False),
    ),
    tiny=DENSE
    | {
        "num_hidden_layers": 8,
        "sliding_window": 24,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 500000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    config_class="Olmo3Config",
    mistake={"sliding_window": 23},
    parity=Parity(
        unscanned_layers=5,
        engine=Engine(layers=4),
        changed=(
            Changed(
                "olmo3",
                "olmo3",
                {"rms_norm_eps": 0.05, "sliding_window": 7},
                rope={"sliding_attention": PLAIN | {"rope_theta": 333.0}, "full_attention": PLAIN},
                layers=4,
            ),
            Changed(
                "olmo3",
                "olmo3",
                {},
                follows=False,
                rope={"sliding_attention": PLAIN, "full_attention": YARN},
                layers=4,
                name="yarn",
                core=True,
            ),
        ),
    ),
)


class TestOlmo3(FamilyTests, CheckTests):
    described = DESCRIPTION

    def test_values(self, hf, tmp_path):
        tensor, leaf = converted(hf, tmp_path / "out")
        norm = tensor("model.layers.5.self_attn.k_norm.weight")
        np.testing.assert_array_equal(leaf("layers/layers_1/attention/key_norm/scale")[:, 1], norm)

    def test_yarn_on_the_full_layers_alone_is_not_maxtexts(self, tmp_path):
        """Right weights, and a model that is too far off: it fails unless the limit is raised."""
        rope = DESCRIPTION.tiny["rope_parameters"] | {"full_attention": YARN | {"rope_theta": 5e5}}
        hf = make_tiny("olmo3", tmp_path / "hf", layers=4, rope_parameters=rope)
        convert(hf, tmp_path / "ckpt", Target(save_dtype="float32"))
        result = run_check(tmp_path / "ckpt", hf, options=Options(tokens=64))
        assert (result.verdict, result.weights, result.model.verdict) == ("fail", "pass", "fail")
        assert result.max_kl < 1e-9 and result.model.max_kl > 1e-3
        assert "RoPE scaling default in its layers of full_attention, the original yarn" in result.reason
        raised = run_check(tmp_path / "ckpt", hf, options=Options(tokens=64, max_model_kl=10.0))
        assert (raised.verdict, raised.model.max_kl) == ("pass", result.model.max_kl)
