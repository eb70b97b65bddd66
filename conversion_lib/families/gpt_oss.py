"""The gpt-oss family: biases, sinks, interleaved gate and up in one tensor, alternating sliding and full attention."""

from __future__ import annotations

from conversion_lib.families.common import (
    DROPS,
    NORMS,
    TOP,
    bias_to_heads,
    from_heads,
    grouped_query_dims,
    linear,
    one_by_one,
    require_layer_types,
    scan_of_cycles,
    to_heads,
    whole_cycles,
)
from conversion_lib.mapping.rules import Family, OpsOf, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.ops import Op, Pick, Split
from conversion_lib.sources.joined import Dims

CYCLE = ("sliding_attention", "full_attention")


def dims(config: ModelConfig) -> Dims:
    sizes = grouped_query_dims(config)
    require_layer_types(config, CYCLE)
    return sizes | {
        "experts": config.count("num_local_experts"),
        "gate_up": 2 * sizes["mlp"],
        "cycles_end": whole_cycles(sizes["layers"], CYCLE),
    }


def every_other(axis: int, index: int) -> OpsOf:
    """Returns the ops that take every second index of `axis`, from `index` 0 (gate) or 1 (up)."""

    def ops(dims: Dims) -> tuple[Op, ...]:
        return Split(axis, (dims["mlp"], 2)), Pick(axis + 1, index, 2)

    return ops


TO, MOE = "GptOssAttention", "GptOssMlp"

LAYER = (
    *NORMS,
    Rule("self_attn.q_proj.weight", f"{TO}/query/kernel", ("q", "hidden"), to_heads("heads", "head_dim")),
    Rule("self_attn.q_proj.bias", f"{TO}/query/bias", ("q",), bias_to_heads("heads", "head_dim")),
    Rule("self_attn.k_proj.weight", f"{TO}/key/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
    Rule("self_attn.k_proj.bias", f"{TO}/key/bias", ("kv",), bias_to_heads("kv_heads", "head_dim")),
    Rule("self_attn.v_proj.weight", f"{TO}/value/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
    Rule("self_attn.v_proj.bias", f"{TO}/value/bias", ("kv",), bias_to_heads("kv_heads", "head_dim")),
    Rule("self_attn.o_proj.weight", f"{TO}/out/kernel", ("hidden", "q"), from_heads("heads", "head_dim")),
    Rule("self_attn.o_proj.bias", f"{TO}/out/bias", ("hidden",)),
    Rule("self_attn.sinks", f"{TO}/sinks", ("heads",)),
    Rule("mlp.router.weight", f"{MOE}/gate/kernel", ("experts", "hidden"), linear),
    Rule("mlp.router.bias", f"{MOE}/gate/bias", ("experts",)),
    Rule("mlp.experts.gate_up_proj", f"{MOE}/wi_0", ("experts", "hidden", "gate_up"), every_other(2, 0)),
    Rule("mlp.experts.gate_up_proj", f"{MOE}/wi_1", ("experts", "hidden", "gate_up"), every_other(2, 1)),
    Rule("mlp.experts.gate_up_proj_bias", f"{MOE}/wi_0_bias", ("experts", "gate_up"), every_other(1, 0)),
    Rule("mlp.experts.gate_up_proj_bias", f"{MOE}/wi_1_bias", ("experts", "gate_up"), every_other(1, 1)),
    Rule("mlp.experts.down_proj", f"{MOE}/wo", ("experts", "mlp", "hidden")),
    Rule("mlp.experts.down_proj_bias", f"{MOE}/wo_bias", ("experts", "hidden")),
)

FAMILY = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    model_type="gpt_oss",
    dims=dims,
    rules=TOP,
    scanned=scan_of_cycles("layers/layers_{}", CYCLE, *LAYER),
    unscanned=one_by_one(*LAYER),
    drops=DROPS,
)
