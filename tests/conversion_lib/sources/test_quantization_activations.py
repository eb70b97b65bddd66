"""Which names are those of scales of activations and caches, and which are not."""

from __future__ import annotations

import re

import pytest

from conversion_lib.sources.quantization.activations import PATTERN, is_of_activations

THEIRS = [
    *(f"{what}_scale" for what in ("input", "output", "act", "activation", "q", "k", "v", "kv", "prob", "softmax")),
    *("query_scale", "key_scale", "value_scale", "qkv_scale", "cache_scale", "scores_scale"),
    *("kv_cache_scale", "k_cache_scale", "v_cache_scale", "kv_cache_scaling_factor", "activation_scaling_factor"),
    *("input_activation_scale", "attn_output_scale", "attn_prob_scale", "attention_k_scale"),
    *("input_scale_ub", "input_scale_inv", "k_scale_inv", "input_scales", "input_zero_point", "q_zero_points"),
    *("input_global_scale", "input_amax", "k_amax"),
]
OTHERS = [
    *("weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_global_scale", "bias", "sinks"),
    *("scale", "layer_scale", "layer_scalar", "per_expert_scale", "pre_quant_scale", "logit_scale", "A_log"),
    *("down_proj_scales", "gate_up_proj_scales", "k_norm", "q_proj_scale", "attn_scale", "input_layernorm"),
    *("", "scale_inv", "input", "k", "_scale", "kv__scale", "xk_scale", "k_scalex"),
]


@pytest.mark.parametrize("before", ["", "model.layers.0.self_attn.", "model.layers.0.self_attn.k_proj.", "a.k_scale."])
def test_what_names_a_scale_of_activations(before):
    for name in THEIRS:
        assert is_of_activations(before + name), name
        assert re.fullmatch(PATTERN, before + name)
    for name in OTHERS:
        assert not is_of_activations(before + name), name
        assert not re.fullmatch(PATTERN, before + name)


def test_a_long_name_takes_no_time():
    assert not is_of_activations("a." * 20_000 + "q_" * 50_000 + "x")
    assert re.fullmatch(PATTERN, "q_" * 50_000 + "x") is None
