"""Mixtral: MaxText stores the query divided by sqrt(head_dim); every layer has experts."""

from __future__ import annotations

from conversion_lib.families.common import (
    DROPS,
    FUSED,
    KEY,
    NORMS,
    TOP,
    VALUE_AND_OUT,
    expert_dims,
    fused_experts,
    fused_experts_flag,
    grouped_query_dims,
    linear,
    one_by_one,
    one_scan,
    scaled_query,
)
from conversion_lib.mapping.rules import Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims


def dims(config: ModelConfig) -> Dims:
    sizes = grouped_query_dims(config)
    return sizes | expert_dims(config.count("num_local_experts"), sizes["mlp"])


FROM, TO = "block_sparse_moe", "MoeBlock_0"

LAYER = (
    *NORMS,
    Rule("self_attn.q_proj.weight", "self_attention/query/kernel", ("q", "hidden"), scaled_query("head_dim")),
    KEY,
    *VALUE_AND_OUT,
    Rule(f"{FROM}.gate.weight", f"{TO}/gate/kernel", ("experts", "hidden"), linear, when=f"!{FUSED}"),
    Rule(f"{FROM}.experts.{{expert}}.w1.weight", f"{TO}/wi_0", ("moe", "hidden"), linear, when=f"!{FUSED}"),
    Rule(f"{FROM}.experts.{{expert}}.w3.weight", f"{TO}/wi_1", ("moe", "hidden"), linear, when=f"!{FUSED}"),
    Rule(f"{FROM}.experts.{{expert}}.w2.weight", f"{TO}/wo", ("hidden", "moe"), linear, when=f"!{FUSED}"),
    # its second name, in transformers' class
    Rule("mlp.gate.weight", f"{TO}/gate/kernel", ("experts", "hidden"), linear, when=FUSED),
    *fused_experts(TO, FUSED),
)

FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    dims=dims,
    rules=TOP,
    scanned=one_scan(*LAYER),
    unscanned=one_by_one(*LAYER),
    drops=DROPS,
    detected=fused_experts_flag(),
)
