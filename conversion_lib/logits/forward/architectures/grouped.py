"""Llama 3, Mixtral, Qwen 2.5, Qwen 3 and Qwen 3 MoE: equal layers with grouped-query attention."""

from __future__ import annotations

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    QUERY,
    Raw,
    Readers,
    grouped_query,
    integer,
    is_power_of_two_root,
    mlp,
    model,
    one_stack,
    refuse_switches,
    require_activation,
)
from conversion_lib.logits.forward.config import ForwardConfig, Moe


def llama(raw: Raw) -> ForwardConfig:
    """Reads Llama 3: the converter interleaves the halves of query and key, and divides the query by sqrt(head_dim)."""
    refuse_switches(raw, "attention_bias", "mlp_bias")
    attention = grouped_query(raw, pairs=True, scale=1.0)
    rounded = () if is_power_of_two_root(attention.head_dim) else (QUERY,)
    return model(raw, one_stack(raw, attention, mlp(raw)), rounded=rounded)


def mixtral(raw: Raw) -> ForwardConfig:
    """Reads Mixtral: the converter divides the query by sqrt(head_dim)."""
    refuse_switches(raw, "sliding_window")
    require_activation(raw, "silu")
    attention = grouped_query(raw, scale=1.0)
    moe = Moe(
        path="MoeBlock_0",
        experts=integer(raw, "num_local_experts", 8),
        per_token=integer(raw, "num_experts_per_tok", 2),
        width=integer(raw, "intermediate_size"),
        scores="softmax",
        normalize=True,
    )
    rounded = () if is_power_of_two_root(attention.head_dim) else (QUERY,)
    return model(raw, one_stack(raw, attention, moe), eps=1e-5, rounded=rounded)


def qwen2(raw: Raw) -> ForwardConfig:
    """Reads Qwen 2.5: biases on query, key and value."""
    refuse_switches(raw, "use_sliding_window")
    return model(raw, one_stack(raw, grouped_query(raw, biases=True), mlp(raw)))


def qwen3(raw: Raw) -> ForwardConfig:
    """Reads Qwen 3: norms on each head's query and key."""
    refuse_switches(raw, "attention_bias", "use_sliding_window")
    return model(raw, one_stack(raw, grouped_query(raw, head_dim=128, norms="head"), mlp(raw)))


def qwen3_moe(raw: Raw) -> ForwardConfig:
    """Reads Qwen 3 MoE: Qwen 3 with experts in every layer."""
    refuse_switches(raw, "attention_bias", "use_sliding_window", "mlp_only_layers")
    require_activation(raw, "silu")
    if raw.get("decoder_sparse_step", 1) != 1:
        raise BadInput(
            f"config.json: decoder_sparse_step {raw['decoder_sparse_step']}; the logit check supports only 1"
        )
    moe = Moe(
        path="moe_block",
        experts=integer(raw, "num_experts", raw.get("num_local_experts") or 128),
        per_token=integer(raw, "num_experts_per_tok", 8),
        width=integer(raw, "moe_intermediate_size", 768),
        scores="softmax",
        normalize=bool(raw.get("norm_topk_prob", False)),
    )
    return model(raw, one_stack(raw, grouped_query(raw, norms="head"), moe))


READERS: Readers = {
    "llama": llama,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
