"""Qwen 3 Next and 3.5: three layers of gated delta nets, then one of gated attention; experts in every layer."""

from __future__ import annotations

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    FULL,
    Readers,
    experts_per_token,
    grouped_query,
    head_dim,
    kinds_of_layers,
    mlp,
    model,
    refuse_switches,
    rope,
)
from conversion_lib.logits.forward.architectures.grouped import require_experts_everywhere
from conversion_lib.logits.forward.config import DeltaNet, ForwardConfig, GroupedQuery, Layer, LayerPath, Moe, Norms
from conversion_lib.models.hf_config import ModelConfig

LINEAR = "linear_attention"
CYCLE = (LINEAR, LINEAR, LINEAR, FULL)
NORMS = Norms("input_layernorm/scale", None, "post_attention_layernorm/scale", None)


def qwen3_next(config: ModelConfig) -> ForwardConfig:
    """Reads Qwen 3 Next.

    In the scan, a cycle is three delta nets, stacked on an axis of their own, and one layer of attention. Remainder
    delta nets are one stack. Norms store their scale minus one, except the norm inside the delta net.
    """
    require_experts_everywhere(config)

    def path_of(n: int, count: int) -> LayerPath:
        cycle, within = divmod(n, len(CYCLE))
        cycles = count // len(CYCLE)
        if cycle == cycles:
            left_over = count % len(CYCLE)
            return LayerPath("layers_remainder/local_layers", (within,), (left_over,), f"layers_{n}")
        if CYCLE[within] == FULL:
            return LayerPath("layers/global_layer", (cycle,), (cycles,), f"layers_{n}")
        return LayerPath("layers/local_layers", (cycle, within), (cycles, CYCLE.index(FULL)), f"layers_{n}")

    count = config.count("num_hidden_layers")
    return _model(config, [path_of(n, count) for n in range(count)], normalize=config.flag("norm_topk_prob"))


def qwen3_5(config: ModelConfig) -> ForwardConfig:
    """Reads Qwen 3.5: in the scan, each position of the cycle is a stack."""
    count = config.count("num_hidden_layers")
    cycles = count // len(CYCLE)
    places = [
        LayerPath(f"layers/layer_{n % len(CYCLE)}", (n // len(CYCLE),), (cycles,), f"layers_{n}") for n in range(count)
    ]
    return _model(config, places, normalize=True)


def _model(config: ModelConfig, paths: list[LayerPath], *, normalize: bool) -> ForwardConfig:
    refuse_switches(config, "attention_bias")
    kinds = kinds_of_layers(config, CYCLE)
    interval = config.count("full_attention_interval")
    if interval != len(CYCLE) and config.get("layer_types") is None:
        raise BadInput(f"{config.path}: full_attention_interval {interval}, where it should be {len(CYCLE)}")
    net, attention, moe = _delta_net(config), _attention(config), _moe(config, normalize)
    layers = tuple(
        Layer(path, NORMS, "attention", net, moe)
        if kind == LINEAR
        else Layer(path, NORMS, "attention/attention", attention, moe)
        for path, kind in zip(paths, kinds, strict=True)
    )
    return model(config, layers, norm_offset=1.0)


def _delta_net(config: ModelConfig) -> DeltaNet:
    keys, values = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    if values % keys:
        raise BadInput(
            f"{config.path}: linear_num_value_heads {values} should be a multiple of linear_num_key_heads {keys}"
        )
    return DeltaNet(
        key_heads=keys,
        value_heads=values,
        key_dim=config.count("linear_key_head_dim"),
        value_dim=config.count("linear_value_head_dim"),
        taps=config.count("linear_conv_kernel_dim"),
    )


def _attention(config: ModelConfig) -> GroupedQuery:
    rotation = rope(config, head_dim(config), pairs=False, takes_share=True)
    return grouped_query(config, rope=rotation, norms="head", norm_offset=1.0, gated=True)


def _moe(config: ModelConfig, normalize: bool) -> Moe:
    experts = config.count("num_experts")
    return Moe(
        path="mlp/routed_experts",
        experts=experts,
        per_token=experts_per_token(config, experts),
        width=config.count("moe_intermediate_size"),
        scores="softmax",
        normalize=normalize,
        shared=mlp(config, "mlp/shared_expert", width="shared_expert_intermediate_size"),
        shared_gate="mlp/shared_expert_gate/kernel",
    )


READERS: Readers = {
    "qwen3_next": qwen3_next,
    "qwen3_5_moe": qwen3_5,
    "qwen3_5_moe_text": qwen3_5,
}
