"""Qwen 3 Next: three layers with a gated delta net for each with full attention; routed and shared experts in all."""

from __future__ import annotations

from conversion_lib.errors import BadInput
from conversion_lib.families.common import (
    DROPS,
    TOP,
    expert_dims,
    experts,
    fused_experts_flag,
    grouped_query_dims,
    linear,
    require_layer_types,
    require_no_dense_layers,
    to_heads,
    whole_cycles,
)
from conversion_lib.mapping.rules import Block, Drop, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.ops import Op, Permute
from conversion_lib.sources.joined import Dims

CYCLE = (*["linear_attention"] * 3, "full_attention")


def dims(config: ModelConfig) -> Dims:
    require_layer_types(config, CYCLE, interval_key="full_attention_interval")
    require_no_dense_layers(config)
    sizes = grouped_query_dims(config)
    moe, shared = config.count("moe_intermediate_size"), config.count("shared_expert_intermediate_size")
    if shared != moe:
        raise BadInput(
            f"{config.path}: shared_expert_intermediate_size = {shared}, but in MaxText's model the shared expert has "
            f"the width of the others, moe_intermediate_size = {moe}"
        )
    key_heads, value_heads = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    if value_heads % key_heads:
        raise BadInput(
            f"{config.path}: linear_num_value_heads = {value_heads} should be a multiple of linear_num_key_heads = "
            f"{key_heads}"
        )
    keys, value_dim = key_heads * config.count("linear_key_head_dim"), config.count("linear_value_head_dim")
    values = value_heads * value_dim
    return sizes | {
        "gated_head_dim": 2 * sizes["head_dim"],
        "gated_q": 2 * sizes["q"],
        **expert_dims(config.count("num_experts"), moe),
        "shared": shared,
        "one": 1,
        "value_heads": value_heads,
        "value_dim": value_dim,
        "values": values,
        "qkvz": 2 * keys + 2 * values,
        "ba": 2 * value_heads,
        "convolved": 2 * keys + values,
        "taps": config.count("linear_conv_kernel_dim"),
        "cycles_end": whole_cycles(sizes["layers"], CYCLE),
    }


def convolution(dims: Dims) -> tuple[Op, ...]:
    """Returns the ops (channels, 1, taps) -> (taps, 1, channels)."""
    return (Permute((2, 1, 0)),)


# also used by Qwen 3.5, where only the projections into a delta net differ
SHARED = (
    Rule("input_layernorm.weight", "input_layernorm/scale", ("hidden",)),
    Rule("post_attention_layernorm.weight", "post_attention_layernorm/scale", ("hidden",)),
    Rule("mlp.gate.weight", "mlp/routed_experts/gate/kernel", ("experts", "hidden"), linear),
    Rule("mlp.shared_expert.gate_proj.weight", "mlp/shared_expert/wi_0/kernel", ("shared", "hidden"), linear),
    Rule("mlp.shared_expert.up_proj.weight", "mlp/shared_expert/wi_1/kernel", ("shared", "hidden"), linear),
    Rule("mlp.shared_expert.down_proj.weight", "mlp/shared_expert/wo/kernel", ("hidden", "shared"), linear),
    Rule("mlp.shared_expert_gate.weight", "mlp/shared_expert_gate/kernel", ("one", "hidden"), linear),
    *experts("mlp/routed_experts"),
)

DELTA_NET = (
    Rule("linear_attn.conv1d.weight", "attention/conv1d/kernel", ("convolved", "one", "taps"), convolution),
    Rule("linear_attn.A_log", "attention/A_log", ("value_heads",)),
    Rule("linear_attn.dt_bias", "attention/dt_bias", ("value_heads",)),
    Rule("linear_attn.norm.weight", "attention/norm/rms_norm/scale", ("value_dim",)),
    Rule("linear_attn.out_proj.weight", "attention/out_proj/kernel", ("hidden", "values"), linear),
)

INTO = (
    Rule("linear_attn.in_proj_qkvz.weight", "attention/in_proj_qkvz/kernel", ("qkvz", "hidden"), linear),
    Rule("linear_attn.in_proj_ba.weight", "attention/in_proj_ba/kernel", ("ba", "hidden"), linear),
)

TO = "attention/attention"

FULL = (
    Rule("self_attn.q_proj.weight", f"{TO}/query/kernel", ("gated_q", "hidden"), to_heads("heads", "gated_head_dim")),
    Rule("self_attn.k_proj.weight", f"{TO}/key/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
    Rule("self_attn.v_proj.weight", f"{TO}/value/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
    Rule("self_attn.o_proj.weight", f"{TO}/out/kernel", ("hidden", "q"), linear),
    Rule("self_attn.q_norm.weight", f"{TO}/query_norm/scale", ("head_dim",)),
    Rule("self_attn.k_norm.weight", f"{TO}/key_norm/scale", ("head_dim",)),
)

LOCAL_LAYER = (*SHARED, *INTO, *DELTA_NET)
GLOBAL_LAYER = (*SHARED, *FULL)
LAST = len(CYCLE) - 1

MTP = Drop("multi-token prediction", r"mtp\..*", "predicts more tokens; MaxText's model has none")

FAMILY = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    model_type="qwen3_next",
    dims=dims,
    rules=TOP,
    scanned=(
        Block("layers/local_layers", LOCAL_LAYER, 0, "cycles_end", len(CYCLE), run=LAST),
        Block("layers/global_layer", GLOBAL_LAYER, LAST, "cycles_end", len(CYCLE)),
        Block("layers_remainder/local_layers", LOCAL_LAYER, "cycles_end", "layers"),
    ),
    unscanned=(
        *(Block("layers_{layer}", LOCAL_LAYER, index, "layers", len(CYCLE)) for index in range(LAST)),
        Block("layers_{layer}", GLOBAL_LAYER, LAST, "layers", len(CYCLE)),
    ),
    drops=(*DROPS, MTP),
    detected=fused_experts_flag(),
)
