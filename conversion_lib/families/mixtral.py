"""Mixtral: the query is stored divided by sqrt(head_dim); every layer has experts."""

from __future__ import annotations

from conversion_lib.config import ModelConfig
from conversion_lib.families.common import (
    DROPS,
    KEY,
    NORMS,
    TOP,
    VALUE_AND_OUT,
    grouped_query_dims,
    linear,
    one_by_one,
    one_scan,
    scaled_query,
)
from conversion_lib.rules import Dims, Family, Rule


def dims(config: ModelConfig) -> Dims:
    return grouped_query_dims(config) | {"experts": config.count("num_local_experts")}


LAYER = (
    *NORMS,
    Rule("self_attn.q_proj.weight", "self_attention/query/kernel", ("q", "hidden"), scaled_query),
    KEY,
    *VALUE_AND_OUT,
    Rule("block_sparse_moe.gate.weight", "MoeBlock_0/gate/kernel", ("experts", "hidden"), linear),
    Rule("block_sparse_moe.experts.{expert}.w1.weight", "MoeBlock_0/wi_0", ("mlp", "hidden"), linear),
    Rule("block_sparse_moe.experts.{expert}.w3.weight", "MoeBlock_0/wi_1", ("mlp", "hidden"), linear),
    Rule("block_sparse_moe.experts.{expert}.w2.weight", "MoeBlock_0/wo", ("hidden", "mlp"), linear),
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
)
