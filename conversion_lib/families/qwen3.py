"""Qwen 3, dense: norms on query and key."""

from __future__ import annotations

from conversion_lib.config import ModelConfig
from conversion_lib.families.common import (
    DROPS,
    MLP,
    NORMS,
    TOP,
    VALUE_AND_OUT,
    grouped_query_dims,
    one_block,
    to_heads,
)
from conversion_lib.rules import Dims, Family, Rule


def dims(config: ModelConfig) -> Dims:
    return grouped_query_dims(config, head_dim=128)


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    dims=dims,
    rules=TOP,
    blocks=one_block(
        *NORMS,
        Rule("self_attn.q_proj.weight", "self_attention/query/kernel", ("q", "hidden"), to_heads("heads", "head_dim")),
        Rule(
            "self_attn.k_proj.weight", "self_attention/key/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")
        ),
        Rule("self_attn.q_norm.weight", "self_attention/query_norm/scale", ("head_dim",)),
        Rule("self_attn.k_norm.weight", "self_attention/key_norm/scale", ("head_dim",)),
        *VALUE_AND_OUT,
        *MLP,
    ),
    drops=DROPS,
)
