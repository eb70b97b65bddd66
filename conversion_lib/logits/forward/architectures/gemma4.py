"""Gemma 4: 26b with experts, 31b without, and the small models E2B and E4B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    Raw,
    Readers,
    grouped_query,
    integer,
    model,
    refuse_switches,
    require_activation,
    rope_by_kind,
)
from conversion_lib.logits.forward.architectures.cycles import FULL, GELU, SLIDING, gemma_norms
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

DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "max_position_embeddings": 131072,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}
"""Defaults of transformers' class: the published files leave out keys with these values."""


def gemma4(raw: Raw) -> ForwardConfig:
    """Reads Gemma 4.

    Full attention has heads of another size. With `attention_k_eq_v` its keys are also its values. Each layer ends with
    a factor on the residual stream.
    """
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    refuse_switches(raw, "attention_bias", "use_bidirectional_attention")
    require_activation(raw, GELU, key="hidden_activation")
    kinds = _kinds(raw)
    layers = _small(raw, kinds) if raw["hidden_size_per_layer_input"] else _large(raw, kinds)
    factor = float(np.float32(integer(raw, "hidden_size") ** 0.5))
    exact = np.frexp(factor)[0] == 0.5  # a power of two rounds nothing
    return model(
        raw,
        layers,
        tied=True,
        embedding_scale=factor,
        rounded=() if exact else ("token_embedder/embedding",),
        softcap=raw.get("final_logit_softcapping"),
        layer_scalars=True,
        per_layer_input=_per_layer_input(raw),
    )


def _kinds(raw: Raw) -> Sequence[str]:
    count = integer(raw, "num_hidden_layers")
    kinds = raw.get("layer_types") or [SLIDING if (n + 1) % 6 else FULL for n in range(count)]
    if len(kinds) != count or set(kinds) - {SLIDING, FULL} or kinds[-1] != FULL:
        raise BadInput(f"config.json: layer_types {kinds!r}, expected {count} of {SLIDING} and {FULL}, the last {FULL}")
    return tuple(kinds)


def _large(raw: Raw, kinds: Sequence[str]) -> tuple[Layer, ...]:
    """In the scan, a cycle is the sliding layers, stacked on an axis of their own, and one full layer."""
    cycle = kinds.index(FULL) + 1
    cycles, local = len(kinds) // cycle, cycle - 1
    feed_forward = _moe(raw) if raw.get("enable_moe_block") else _mlp(raw, "mlp")

    def path_of(n: int, kind: str) -> LayerPath:
        if kind == FULL:
            return LayerPath("scanned_blocks/global_layer", (n // cycle,), (cycles,), f"layers_{n}")
        return LayerPath("scanned_blocks/local_layers", (n // cycle, n % cycle), (cycles, local), f"layers_{n}")

    return tuple(
        Layer(path_of(n, kind), gemma_norms(), "self_attention", _attention(raw, kind), feed_forward)
        for n, kind in enumerate(kinds)
    )


def _small(raw: Raw, kinds: Sequence[str]) -> tuple[Layer, ...]:
    """The last layers share keys and values of the last earlier layer of their kind. Never scanned."""
    own = len(kinds) - int(raw.get("num_kv_shared_layers") or 0)
    last = {kind: n for n, kind in enumerate(kinds[:own])}
    wide = _mlp(raw, "mlp", times=2 if raw.get("use_double_wide_mlp") else 1)

    def layer(n: int, kind: str) -> Layer:
        path, attention = LayerPath(f"layers_{n}", (), (), f"layers_{n}"), _attention(raw, kind)
        if n < own:
            return Layer(path, gemma_norms(), "self_attention", attention, _mlp(raw, "mlp"))
        if kind not in last:
            raise BadInput(f"config.json: layer {n} shares keys and values, but no earlier layer of {kind} has its own")
        attention = replace(attention, keys="earlier", keys_from=last[kind])
        return Layer(path, gemma_norms(), "self_attention", attention, wide)

    return tuple(layer(n, kind) for n, kind in enumerate(kinds))


def _attention(raw: Raw, kind: str) -> GroupedQuery:
    sizes = dict(raw)
    if kind == FULL:
        sizes |= _full_sizes(raw)
    rotation = rope_by_kind(raw, kind, integer(sizes, "head_dim"), local_theta=1e4, theta=1e6)
    return grouped_query(
        sizes,
        rope=rotation,
        scale=1.0,
        norms="head",
        value_norm=True,
        keys="as_values" if kind == FULL and raw.get("attention_k_eq_v") else "own",
        window=integer(raw, "sliding_window") if kind == SLIDING else None,
    )


def _full_sizes(raw: Raw) -> dict[str, Any]:
    """Head size and key-value heads of full attention.

    Published files have them under keys with `global`; transformers writes them for each layer.
    """
    by_layer = raw.get("per_layer_config")
    if isinstance(by_layer, dict) and by_layer:
        return dict(next(iter(by_layer.values())))
    heads = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None
    return {"head_dim": raw["global_head_dim"]} | ({"num_key_value_heads": heads} if heads else {})


def _mlp(raw: Raw, path: str, times: int = 1) -> Mlp:
    return Mlp(path, times * integer(raw, "intermediate_size"), "gelu")


def _moe(raw: Raw) -> Moe:
    """The dense MLP is the shared expert. Router and routed experts norm the stream themselves."""
    return Moe(
        path="mlp/moe_block/MoeBlock_0",
        experts=integer(raw, "num_experts"),
        per_token=integer(raw, "top_k_experts"),
        width=integer(raw, "moe_intermediate_size"),
        scores="softmax",
        normalize=True,
        activation="gelu",
        shared=_mlp(raw, "mlp/moe_block/shared_experts"),
        norms=ExpertNorms(
            router_scale="mlp/pre_forward_scale_2",
            before_experts="mlp/pre_feedforward_layernorm_2/scale",
            after_shared="mlp/post_feedforward_layernorm_1/scale",
            after_experts="mlp/post_feedforward_layernorm_2/scale",
        ),
        expert_scales=True,
    )


def _per_layer_input(raw: Raw) -> PerLayerInput | None:
    if not raw["hidden_size_per_layer_input"]:
        return None
    rows, vocab = integer(raw, "vocab_size_per_layer_input"), integer(raw, "vocab_size")
    if rows != vocab:
        raise BadInput(f"config.json: vocab_size_per_layer_input {rows}, expected vocab_size, {vocab}")
    return PerLayerInput(integer(raw, "hidden_size_per_layer_input"), "gelu")


READERS: Readers = {
    "gemma4": gemma4,
    "gemma4_text": gemma4,
}
