"""config.json as the Hub has it and as transformers writes it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.config import RopeConfig, differences
from conversion_lib.logits.forward.memory import divide
from conversion_lib.logits.forward.rope import inverse_frequencies
from tests.support.family import published

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


def test_both_spellings_of_rope():
    old = (
        parse_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}})
        .layers[0]
        .attention.rope
    )
    new = (
        parse_config({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}})
        .layers[0]
        .attention.rope
    )
    assert (old.kind, old.theta, old.pairs) == (new.kind, new.theta, new.pairs) == ("llama3", 5e5, True)
    np.testing.assert_array_equal(inverse_frequencies(old)[0], inverse_frequencies(new)[0])


def test_defaults_of_a_plain_config():
    config = parse_config({**LLAMA, "rope_scaling": None})
    attention = config.layers[0].attention
    assert (attention.head_dim, attention.rope.kind, attention.rope.theta) == (16, "default", 10000.0)
    assert (config.tied, len(config.layers)) == (False, 2)


def test_what_differs_is_named():
    mine = parse_config(LLAMA)
    assert list(differences(mine, mine)) == []
    assert list(differences(mine, parse_config({**LLAMA, "vocab_size": 99}))) == ["vocab 100 against 99"]
    assert list(differences(mine, parse_config({**LLAMA, "num_hidden_layers": 3}))) == ["layers 2 against 3"]
    wider = parse_config({**LLAMA, "intermediate_size": 97})
    assert list(differences(mine, wider)) == ["layer 0: feed_forward width 96 against 97"]
    # spelled in another way, and the same
    assert list(differences(mine, parse_config({**LLAMA, "rope_scaling": {"type": "default"}}))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            r"architecture GPT2LMHeadModel \(model_type 'gpt2'\): conversion_lib/logits/forward/architectures has no "
            r"reader for it; there is one for .*llama.* docs/add_a_family\.md",
        ),
        ({"attention_bias": True}, "attention_bias is on"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": "64"}, "hidden_size should be an integer of at least 1, not '64'"),
        ({"rope_scaling": {"type": "longrope"}}, "RoPE scaling 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_it_does_not_have_is_refused(change, message):
    with pytest.raises(BadInput, match=message):
        parse_config({**LLAMA, **change})


def test_linear_scaling():
    plain, _ = inverse_frequencies(RopeConfig("default", 8, 100.0, True, {}))
    linear, factor = inverse_frequencies(RopeConfig("linear", 8, 100.0, True, {"factor": 4.0}))
    np.testing.assert_allclose(plain, [1, 100**-0.25, 0.1, 100**-0.75], rtol=1e-6)
    np.testing.assert_array_equal(linear, plain / 4)
    assert factor == 1.0


def test_yarn_keeps_fast_and_stretches_slow_dimensions():
    values = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    plain, _ = inverse_frequencies(RopeConfig("default", 64, 10000.0, True, {}))
    yarn, factor = inverse_frequencies(RopeConfig("yarn", 64, 10000.0, True, values))
    assert yarn[0] == plain[0]
    assert math.isclose(yarn[-1], plain[-1] / 40, rel_tol=1e-6)
    assert math.isclose(factor, 0.1 * math.log(40) + 1)


def test_proportional_turns_the_first_share_of_the_pairs():
    """Gemma 4's full attention: a quarter of the angles, in steps of the whole head."""
    plain, _ = inverse_frequencies(RopeConfig("default", 16, 100.0, False, {}))
    values = {"factor": 1.0, "partial_rotary_factor": 0.25}
    found, _ = inverse_frequencies(RopeConfig("proportional", 16, 100.0, False, values))
    np.testing.assert_array_equal(found, [*plain[:2], *[0] * 6])


@pytest.mark.parametrize("name", ["gemma4-26b", "qwen3.5-397b-a17b", "qwen3-480b-a35b"])
def test_the_budget_is_enough_for_the_usual_prompts(name):
    config = parse_config(published(name).config)
    memory = divide(6 << 30, config, 688)
    assert memory.slice_bytes > 100 << 20
    assert memory.score_bytes < 4 * config.heads * 688**2 * 8
    with pytest.raises(BadInput, match="or check fewer --tokens"):
        divide(2 << 30, config, 688)
