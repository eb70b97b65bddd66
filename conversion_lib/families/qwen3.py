"""Qwen 3, dense: norms on query and key."""

from __future__ import annotations

from conversion_lib.families.common import (
    DROPS,
    KEY,
    MLP,
    NORMS,
    QUERY,
    TOP,
    VALUE_AND_OUT,
    grouped_query_dims,
    one_by_one,
    one_scan,
)
from conversion_lib.mapping.rules import Family, Rule

ATTENTION = (
    *NORMS,
    QUERY,
    KEY,
    Rule("self_attn.q_norm.weight", "self_attention/query_norm/scale", ("head_dim",)),
    Rule("self_attn.k_norm.weight", "self_attention/key_norm/scale", ("head_dim",)),
    *VALUE_AND_OUT,
)

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    dims=grouped_query_dims,
    rules=TOP,
    scanned=one_scan(*ATTENTION, *MLP),
    unscanned=one_by_one(*ATTENTION, *MLP),
    drops=DROPS,
)
