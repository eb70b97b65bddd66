"""Olmo 3: norms only after attention and MLP, and norms over all heads of query and key together."""

from __future__ import annotations

from conversion_lib.families.common import (
    DROPS,
    MLP,
    TOP,
    from_heads,
    grouped_query_dims,
    one_by_one,
    require_layer_types,
    scan_of_cycles,
    to_heads,
    whole_cycles,
)
from conversion_lib.mapping.rules import Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims

CYCLE = (*["sliding_attention"] * 3, "full_attention")


def dims(config: ModelConfig) -> Dims:
    sizes = grouped_query_dims(config)
    require_layer_types(config, CYCLE)
    return sizes | {"cycles_end": whole_cycles(sizes["layers"], CYCLE)}


LAYER = (
    Rule("post_attention_layernorm.weight", "post_self_attention_layer_norm/scale", ("hidden",)),
    Rule("post_feedforward_layernorm.weight", "post_mlp_layer_norm/scale", ("hidden",)),
    Rule("self_attn.q_proj.weight", "attention/query/kernel", ("q", "hidden"), to_heads("heads", "head_dim")),
    Rule("self_attn.k_proj.weight", "attention/key/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
    Rule("self_attn.v_proj.weight", "attention/value/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
    Rule("self_attn.o_proj.weight", "attention/out/kernel", ("hidden", "q"), from_heads("heads", "head_dim")),
    Rule("self_attn.q_norm.weight", "attention/query_norm/scale", ("q",)),
    Rule("self_attn.k_norm.weight", "attention/key_norm/scale", ("kv",)),
    *MLP,
)

FAMILY = Family(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    model_type="olmo3",
    dims=dims,
    rules=TOP,
    scanned=scan_of_cycles("layers/layers_{}", CYCLE, *LAYER),
    unscanned=one_by_one(*LAYER),
    drops=DROPS,
)
