"""Gemma 4: 26b with experts, 31b without, and the small models E2B and E4B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    FULL,
    SLIDING,
    Readers,
    experts_per_token,
    grouped_query,
    head_dim,
    kinds_of_layers,
    model,
    refuse_switches,
    require_activation,
    rope_by_kind,
    sliding_window,
)
from conversion_lib.logits.forward.architectures.cycles import GELU, gemma_norms
from conversion_lib.logits.forward.config import (
    ExpertNorms,
    ForwardConfig,
    GroupedQuery,
    Layer,
    LayerPath,
    Mlp,
    Moe,
    PerLayerInput,
)
from conversion_lib.models.hf_config import ModelConfig, shown

VISION_ALONE = "vision"
"""What looks at later tokens too, of a model that sees: not texts."""


def gemma4(config: ModelConfig) -> ForwardConfig:
    """Reads Gemma 4.

    Full attention has heads of another size. With `attention_k_eq_v` its keys are also its values. Each layer ends with
    a factor on the residual stream.
    """
    refuse_switches(config, "attention_bias")
    seen = config.get("use_bidirectional_attention")
    if seen is not None and seen is not False and seen != VISION_ALONE:
        raise BadInput(
            f"{config.path}: use_bidirectional_attention {shown(seen)}; the logit check supports only {VISION_ALONE}"
        )
    require_activation(config, GELU, key="hidden_activation")
    kinds = _kinds(config)
    per_layer_input = _per_layer_input(config)
    layers = _small(config, kinds) if per_layer_input else _large(config, kinds)
    factor = float(np.float32(config.count("hidden_size") ** 0.5))
    exact = np.frexp(factor)[0] == 0.5  # a power of two rounds nothing
    return model(
        config,
        layers,
        tied=True,
        embedding_scale=factor,
        rounded=() if exact else ("token_embedder/embedding",),
        softcap=config.optional_number("final_logit_softcapping", above=0),
        layer_scalars=True,
        per_layer_input=per_layer_input,
    )


def _kinds(config: ModelConfig) -> Sequence[str]:
    kinds = kinds_of_layers(config, (*[SLIDING] * 5, FULL))
    if config.get("layer_types") is None:
        return (*kinds[:-1], FULL)
    if kinds[-1] != FULL:
        raise BadInput(f"{config.path}: layer_types ends with {kinds[-1]}, and the last layer should have {FULL}")
    return kinds


def _large(config: ModelConfig, kinds: Sequence[str]) -> tuple[Layer, ...]:
    """In the scan, a cycle is the sliding layers, stacked on an axis of their own, and one full layer."""
    cycle = kinds.index(FULL) + 1
    cycles, local = len(kinds) // cycle, cycle - 1
    if tuple(kinds) != (*[SLIDING] * local, FULL) * cycles:
        raise BadInput(f"{config.path}: layer_types {shown(list(kinds))} are no whole cycles of {cycle} layers")
    feed_forward = _moe(config) if config.flag("enable_moe_block") else _mlp(config, "mlp")

    def path_of(n: int, kind: str) -> LayerPath:
        if kind == FULL:
            return LayerPath("scanned_blocks/global_layer", (n // cycle,), (cycles,), f"layers_{n}")
        return LayerPath("scanned_blocks/local_layers", (n // cycle, n % cycle), (cycles, local), f"layers_{n}")

    attention, norms = {kind: _attention(config, kind) for kind in set(kinds)}, gemma_norms()
    return tuple(
        Layer(path_of(n, kind), norms, "self_attention", attention[kind], feed_forward) for n, kind in enumerate(kinds)
    )


def _small(config: ModelConfig, kinds: Sequence[str]) -> tuple[Layer, ...]:
    """The last layers share keys and values of the last earlier layer of their kind. Never scanned."""
    if (own := len(kinds) - config.count("num_kv_shared_layers", least=0)) < 0:
        raise BadInput(f"{config.path}: num_kv_shared_layers is more than the {len(kinds)} layers that there are")
    last = {kind: n for n, kind in enumerate(kinds[:own])}
    narrow, wide = _mlp(config, "mlp"), _mlp(config, "mlp", times=2 if config.flag("use_double_wide_mlp") else 1)
    by_kind, norms = {kind: _attention(config, kind) for kind in set(kinds)}, gemma_norms()

    def layer(n: int, kind: str) -> Layer:
        path, attention = LayerPath(f"layers_{n}", (), (), f"layers_{n}"), by_kind[kind]
        if n < own:
            return Layer(path, norms, "self_attention", attention, narrow)
        if kind not in last:
            raise BadInput(f"{config.path}: layer {n} shares keys and values, and no layer of {kind} before it has any")
        attention = replace(attention, keys="earlier", keys_from=last[kind])
        return Layer(path, norms, "self_attention", attention, wide)

    return tuple(layer(n, kind) for n, kind in enumerate(kinds))


def _attention(config: ModelConfig, kind: str) -> GroupedQuery:
    dim, kv_heads = _full_sizes(config) if kind == FULL else (head_dim(config), None)
    return grouped_query(
        config,
        head_dim=dim,
        kv_heads=kv_heads,
        rope=rope_by_kind(config, kind, dim, theta=None),
        scale=1.0,
        norms="head",
        value_norm=True,
        keys="as_values" if kind == FULL and config.flag("attention_k_eq_v") else "own",
        window=sliding_window(config, kind),
    )


def _full_sizes(config: ModelConfig) -> tuple[int, int | None]:
    """Head size and key-value heads of full attention.

    Published files have them under keys with `global`; transformers writes them for each layer.
    """
    by_layer = config.section("per_layer_config")
    if by_layer is not None and (own := by_layer.sections()):
        found = {(one.count("head_dim", head_dim(config)), one.optional_count("num_key_value_heads")) for one in own}
        if len(found) > 1:
            raise BadInput(f"{config.path}: per_layer_config has layers of several sizes, and the logit check one size")
        return found.pop()
    kv_heads = config.optional_count("num_global_key_value_heads")
    return config.count("global_head_dim"), kv_heads if config.flag("attention_k_eq_v") else None


def _mlp(config: ModelConfig, path: str, times: int = 1) -> Mlp:
    return Mlp(path, times * config.count("intermediate_size"), "gelu")


def _moe(config: ModelConfig) -> Moe:
    """The dense MLP is the shared expert. Router and routed experts norm the stream themselves."""
    experts = config.count("num_experts")
    return Moe(
        path="mlp/moe_block/MoeBlock_0",
        experts=experts,
        per_token=experts_per_token(config, experts, "top_k_experts"),
        width=config.count("moe_intermediate_size"),
        scores="softmax",
        normalize=True,
        activation="gelu",
        shared=_mlp(config, "mlp/moe_block/shared_experts"),
        norms=ExpertNorms(
            router_scale="mlp/pre_forward_scale_2",
            before_experts="mlp/pre_feedforward_layernorm_2/scale",
            after_shared="mlp/post_feedforward_layernorm_1/scale",
            after_experts="mlp/post_feedforward_layernorm_2/scale",
        ),
        expert_scales=True,
    )


def _per_layer_input(config: ModelConfig) -> PerLayerInput | None:
    if not (width := config.count("hidden_size_per_layer_input", least=0)):
        return None
    rows, vocab = config.count("vocab_size_per_layer_input"), config.count("vocab_size")
    if rows != vocab:
        raise BadInput(
            f"{config.path}: vocab_size_per_layer_input {rows}; the logit check supports only vocab_size, {vocab}"
        )
    return PerLayerInput(width, "gelu")


READERS: Readers = {
    "gemma4": gemma4,
    "gemma4_text": gemma4,
}
