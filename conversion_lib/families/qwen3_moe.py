"""Qwen 3 MoE: Qwen 3's attention with experts in every layer."""

from __future__ import annotations

from conversion_lib.families import qwen3
from conversion_lib.families.common import (
    DROPS,
    TOP,
    expert_dims,
    experts,
    fused_experts_flag,
    grouped_query_dims,
    linear,
    one_by_one,
    one_scan,
    require_no_dense_layers,
)
from conversion_lib.mapping.rules import Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims


def dims(config: ModelConfig) -> Dims:
    require_no_dense_layers(config)
    experts, moe = config.count("num_experts"), config.count("moe_intermediate_size")
    return {**grouped_query_dims(config), **expert_dims(experts, moe)}


LAYER = (
    *qwen3.ATTENTION,
    Rule("mlp.gate.weight", "moe_block/gate/kernel", ("experts", "hidden"), linear),
    *experts("moe_block"),
)

FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    dims=dims,
    rules=TOP,
    scanned=one_scan(*LAYER),
    unscanned=one_by_one(*LAYER),
    drops=DROPS,
    detected=fused_experts_flag(),
)
