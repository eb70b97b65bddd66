"""Llama 3, Mixtral, Qwen 2.5, Qwen 3 and Qwen 3 MoE: equal layers with grouped-query attention."""

from __future__ import annotations

from dataclasses import replace

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    FULL,
    QUERY,
    SLIDING,
    Readers,
    experts_per_token,
    grouped_query,
    is_power_of_two_root,
    kinds_of_layers,
    mlp,
    model,
    one_stack,
    refuse_switches,
    require_activation,
)
from conversion_lib.logits.forward.config import ForwardConfig, GroupedQuery, Layer, Moe
from conversion_lib.models.hf_config import ModelConfig


def llama(config: ModelConfig) -> ForwardConfig:
    """Reads Llama 3: the converter interleaves the halves of query and key, and divides the query by sqrt(head_dim)."""
    refuse_switches(config, "attention_bias", "mlp_bias")
    attention = grouped_query(config, pairs=True, scale=1.0)
    rounded = () if is_power_of_two_root(attention.head_dim) else (QUERY,)
    return model(config, one_stack(config, attention, mlp(config)), rounded=rounded)


def mixtral(config: ModelConfig) -> ForwardConfig:
    """Reads Mixtral: the converter divides the query by sqrt(head_dim)."""
    require_activation(config, "silu")
    window, experts = config.optional_count("sliding_window"), config.count("num_local_experts")
    attention = grouped_query(config, scale=1.0, window=window)
    moe = Moe(
        path="MoeBlock_0",
        experts=experts,
        per_token=experts_per_token(config, experts),
        width=config.count("intermediate_size"),
        scores="softmax",
        normalize=True,
    )
    rounded = () if is_power_of_two_root(attention.head_dim) else (QUERY,)
    return model(config, one_stack(config, attention, moe), rounded=rounded)


def qwen2(config: ModelConfig) -> ForwardConfig:
    """Reads Qwen 2.5: biases on query, key and value."""
    return model(config, _some_sliding(config, grouped_query(config, biases=True)))


def qwen3(config: ModelConfig) -> ForwardConfig:
    """Reads Qwen 3: norms on each head's query and key."""
    refuse_switches(config, "attention_bias")
    return model(config, _some_sliding(config, grouped_query(config, norms="head")))


def _some_sliding(config: ModelConfig, attention: GroupedQuery) -> tuple[Layer, ...]:
    """Makes layers with a dense MLP, some of which may have sliding attention.

    Those are the layers that `layer_types` names, or else all from `max_window_layers` on.

    Raises:
        BadInput: `layer_types` names some, and there is no window.
    """
    layers = one_stack(config, attention, mlp(config))
    window, first = _window(config), config.count("max_window_layers", least=0)
    if config.get("layer_types") is not None:
        kinds = kinds_of_layers(config, (FULL, SLIDING))
    else:
        kinds = tuple(SLIDING if window is not None and n >= first else FULL for n in range(len(layers)))
    if SLIDING in kinds and window is None:
        raise BadInput(
            f"{config.path}: layer_types has {SLIDING}, and there is no window: use_sliding_window is off, or "
            "sliding_window is null"
        )
    sliding = replace(attention, window=window)
    return tuple(
        replace(layer, attention=sliding) if kind == SLIDING else layer
        for layer, kind in zip(layers, kinds, strict=True)
    )


def _window(config: ModelConfig) -> int | None:
    """How far a layer with sliding attention looks back; None: as far as there is something."""
    return config.optional_count("sliding_window") if config.flag("use_sliding_window") else None


def qwen3_moe(config: ModelConfig) -> ForwardConfig:
    """Reads Qwen 3 MoE: Qwen 3 with experts in every layer."""
    refuse_switches(config, "attention_bias")
    require_experts_everywhere(config)
    require_activation(config, "silu")
    experts = config.count("num_experts")
    moe = Moe(
        path="moe_block",
        experts=experts,
        per_token=experts_per_token(config, experts),
        width=config.count("moe_intermediate_size"),
        scores="softmax",
        normalize=config.flag("norm_topk_prob"),
    )
    attention = grouped_query(config, norms="head", window=_window(config))
    return model(config, one_stack(config, attention, moe))


def require_experts_everywhere(config: ModelConfig) -> None:
    """Raises BadInput where some layers have no experts."""
    if config.integers("mlp_only_layers"):
        raise BadInput(f"{config.path}: mlp_only_layers names layers, and the logit check has experts in all")
    if (step := config.count("decoder_sparse_step")) != 1:
        raise BadInput(f"{config.path}: decoder_sparse_step {step}; the logit check supports only 1")


READERS: Readers = {
    "llama": llama,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
