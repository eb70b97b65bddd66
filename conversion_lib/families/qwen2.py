"""Qwen 2.5: biases on query, key and value."""

from __future__ import annotations

from conversion_lib.families.common import (
    DROPS,
    KEY,
    MLP,
    NORMS,
    QUERY,
    TOP,
    VALUE_AND_OUT,
    bias_to_heads,
    grouped_query_dims,
    one_by_one,
    one_scan,
)
from conversion_lib.mapping.rules import Family, Rule

LAYER = (
    *NORMS,
    QUERY,
    KEY,
    *VALUE_AND_OUT,
    Rule("self_attn.q_proj.bias", "self_attention/query/bias", ("q",), bias_to_heads("heads", "head_dim")),
    Rule("self_attn.k_proj.bias", "self_attention/key/bias", ("kv",), bias_to_heads("kv_heads", "head_dim")),
    Rule("self_attn.v_proj.bias", "self_attention/value/bias", ("kv",), bias_to_heads("kv_heads", "head_dim")),
    *MLP,
)

FAMILY = Family(
    name="qwen2.5",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    dims=grouped_query_dims,
    rules=TOP,
    scanned=one_scan(*LAYER),
    unscanned=one_by_one(*LAYER),
    drops=DROPS,
)
