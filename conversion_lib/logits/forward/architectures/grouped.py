"""Llama 3, Mixtral, Qwen 2.5, Qwen 3 and Qwen 3 MoE: equal layers with grouped-query attention."""

from __future__ import annotations

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
from conversion_lib.logits.forward.config import ForwardConfig, Moe
from conversion_lib.models.hf_config import ModelConfig


def llama(config: ModelConfig) -> ForwardConfig:
    """Reads Llama 3: the converter interleaves the halves of query and key, and divides the query by sqrt(head_dim)."""
    refuse_switches(config, "attention_bias", "mlp_bias")
    attention = grouped_query(config, pairs=True, scale=1.0)
    rounded = () if is_power_of_two_root(attention.head_dim) else (QUERY,)
    return model(config, one_stack(config, attention, mlp(config)), rounded=rounded)


def mixtral(config: ModelConfig) -> ForwardConfig:
    """Reads Mixtral: the converter divides the query by sqrt(head_dim)."""
    if config.optional_count("sliding_window") is not None:
        raise BadInput(f"{config.path}: sliding_window is set, which the logit check does not support")
    require_activation(config, "silu")
    attention, experts = grouped_query(config, scale=1.0), config.count("num_local_experts")
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
    _refuse_windows(config)
    return model(config, one_stack(config, grouped_query(config, biases=True), mlp(config)))


def qwen3(config: ModelConfig) -> ForwardConfig:
    """Reads Qwen 3: norms on each head's query and key."""
    refuse_switches(config, "attention_bias")
    _refuse_windows(config)
    return model(config, one_stack(config, grouped_query(config, norms="head"), mlp(config)))


def _refuse_windows(config: ModelConfig) -> None:
    """Raises BadInput where a layer has sliding attention."""
    on = config.flag("use_sliding_window") and config.optional_count("sliding_window") is not None
    first, count = config.count("max_window_layers", least=0), config.count("num_hidden_layers")
    said = config.get("layer_types") is not None
    if SLIDING in kinds_of_layers(config, (FULL, SLIDING)) if said else on and first < count:
        key = "layer_types" if said else "use_sliding_window"
        raise BadInput(f"{config.path}: {key} asks for {SLIDING}, which the logit check does not support here")


def qwen3_moe(config: ModelConfig) -> ForwardConfig:
    """Reads Qwen 3 MoE: Qwen 3 with experts in every layer."""
    refuse_switches(config, "attention_bias")
    require_experts_everywhere(config)
    require_activation(config, "silu")
    if config.flag("use_sliding_window") and config.optional_count("sliding_window") is not None:
        raise BadInput(f"{config.path}: use_sliding_window is on, which the logit check does not support")
    experts = config.count("num_experts")
    moe = Moe(
        path="moe_block",
        experts=experts,
        per_token=experts_per_token(config, experts),
        width=config.count("moe_intermediate_size"),
        scores="softmax",
        normalize=config.flag("norm_topk_prob"),
    )
    return model(config, one_stack(config, grouped_query(config, norms="head"), moe))


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
