"""gpt-oss, Gemma 2 and 3, Olmo 3: sliding and full attention alternate in cycles, and the scan is over cycles."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    FULL,
    LAYER_NORMS,
    QUERY,
    SLIDING,
    Readers,
    cycle_path,
    experts_per_token,
    grouped_query,
    head_dim,
    is_power_of_two_root,
    kinds_of_layers,
    mlp,
    model,
    refuse_switches,
    require_activation,
    rope_by_kind,
    sliding_window,
)
from conversion_lib.logits.forward.config import ForwardConfig, GroupedQuery, Layer, LayerPath, Mlp, Moe, Norms
from conversion_lib.logits.forward.moe import GPT_OSS_ALPHA
from conversion_lib.models.class_defaults import known_as
from conversion_lib.models.hf_config import ModelConfig

GELU = "gelu_pytorch_tanh"
GEMMA_NORMS = ("pre_self_attention_norm", "post_self_attention_norm", "pre_ffw_norm", "post_ffw_norm")

GEMMA_ROWS = {"gemma2": {256000: 256128}, "gemma3": {262208: 262144}}
"""Rows of MaxText's embedding, by the vocabulary of the published models: padded for Gemma 2, cut for Gemma 3, whose
last rows stand for no token of a text."""


def gpt_oss(config: ModelConfig) -> ForwardConfig:
    """Reads gpt-oss: biases everywhere, attention sinks, and a clamped SwiGLU."""
    if not config.flag("attention_bias"):
        raise BadInput(f"{config.path}: attention_bias is off, and the logit check supports gpt-oss with biases only")
    if (alpha := config.number("swiglu_alpha")) != GPT_OSS_ALPHA:
        raise BadInput(f"{config.path}: swiglu_alpha {alpha:g}; the logit check supports only {GPT_OSS_ALPHA}")
    require_activation(config, "silu")
    attention = grouped_query(config, biases=True, out_bias=True, sinks=True)
    experts = config.count("num_local_experts")
    moe = Moe(
        path="GptOssMlp",
        experts=experts,
        per_token=experts_per_token(config, experts),
        width=config.count("intermediate_size"),
        scores="chosen_softmax",
        biases=True,
        clamp=config.number("swiglu_limit", above=0),
    )
    kinds = kinds_of_layers(config, (SLIDING, FULL))
    layers = tuple(
        Layer(
            cycle_path(n, 2, len(kinds)),
            LAYER_NORMS,
            "GptOssAttention",
            replace(attention, window=sliding_window(config, kind)),
            moe,
        )
        for n, kind in enumerate(kinds)
    )
    return model(config, layers)


def olmo3(config: ModelConfig) -> ForwardConfig:
    """Reads Olmo 3: norms only after attention and MLP, and query and key norms over all heads together."""
    refuse_switches(config, "attention_bias")
    dense, dim, theta = mlp(config), head_dim(config), config.number("rope_theta", above=1)
    norms = Norms(None, "post_self_attention_layer_norm/scale", None, "post_mlp_layer_norm/scale")
    kinds = kinds_of_layers(config, (SLIDING, SLIDING, SLIDING, FULL))

    def attention(kind: str) -> GroupedQuery:
        rotation = rope_by_kind(config, kind, dim, theta=theta)
        return grouped_query(config, norms="all_heads", rope=rotation, window=sliding_window(config, kind))

    by_kind = {kind: attention(kind) for kind in set(kinds)}
    layers = tuple(
        Layer(cycle_path(n, 4, len(kinds)), norms, "attention", by_kind[kind], dense) for n, kind in enumerate(kinds)
    )
    return model(config, layers)


def gemma2(config: ModelConfig) -> ForwardConfig:
    """Reads Gemma 2: a MaxText layer holds two layers and does not scale scores; the query is scaled when converted."""
    refuse_switches(config, "attention_bias", "use_bidirectional_attention")
    softcap, root = config.optional_number("attn_logit_softcapping", above=0), config.count("query_pre_attn_scalar")
    kinds = kinds_of_layers(config, (SLIDING, FULL))
    if len(kinds) % 2:
        raise BadInput(f"{config.path}: num_hidden_layers {len(kinds)}, where MaxText's model has pairs of layers")

    def half(kind: str) -> tuple[Norms, str, GroupedQuery, Mlp]:
        name = "local" if kind == SLIDING else "global"
        attention = grouped_query(config, scale=1.0, window=sliding_window(config, kind), softcap=softcap)
        return gemma_norms(f"_{name}"), f"self_attention_{name}", attention, _geglu(config, f"mlp_{name}")

    halves = {kind: half(kind) for kind in set(kinds)}
    layers = tuple(
        Layer(LayerPath("layers", (n // 2,), (len(kinds) // 2,), f"layers_{n // 2}"), *halves[kind])
        for n, kind in enumerate(kinds)
    )
    rounded = () if is_power_of_two_root(root) else (QUERY,)
    return _gemma(config, layers, float(np.float32(config.count("hidden_size") ** 0.5)), rounded)


def gemma3(config: ModelConfig) -> ForwardConfig:
    """Reads Gemma 3: norms on each head's query and key, and an embedding factor rounded to bfloat16."""
    refuse_switches(config, "attention_bias", "use_bidirectional_attention")
    dim, scale = head_dim(config), config.count("query_pre_attn_scalar") ** -0.5
    kinds = _gemma3_kinds(config)
    thetas = {
        SLIDING: config.number("rope_local_base_freq", above=1),
        FULL: config.number("rope_theta", above=1),
    }

    def attention(kind: str) -> GroupedQuery:
        rotation = rope_by_kind(config, kind, dim, theta=thetas[kind])
        return grouped_query(config, norms="head", rope=rotation, scale=scale, window=sliding_window(config, kind))

    by_kind, norms, dense = {kind: attention(kind) for kind in set(kinds)}, gemma_norms(), _geglu(config, "mlp")
    layers = tuple(
        Layer(cycle_path(n, 6, len(kinds)), norms, "self_attention", by_kind[kind], dense)
        for n, kind in enumerate(kinds)
    )
    return _gemma(config, layers, float(ml_dtypes.bfloat16(config.count("hidden_size") ** 0.5)), ())


def _gemma3_kinds(config: ModelConfig) -> tuple[str, ...]:
    """As `layer_types` says, or older files by the length of a cycle."""
    if config.get("layer_types") is None and (length := config.count("sliding_window_pattern")) != 6:
        raise BadInput(f"{config.path}: sliding_window_pattern {length}, where it should be 6")
    return kinds_of_layers(config, (*[SLIDING] * 5, FULL))


def _gemma(config: ModelConfig, layers: tuple[Layer, ...], factor: float, rounded: tuple[str, ...]) -> ForwardConfig:
    if np.frexp(factor)[0] != 0.5:  # no power of two: the scaled embedding is rounded
        rounded = (*rounded, "token_embedder/embedding")
    vocab = config.count("vocab_size")
    return model(
        config,
        layers,
        tied=True,
        embedding_scale=factor,
        rounded=rounded,
        rows=GEMMA_ROWS[known_as(config.model_type)].get(vocab, vocab),
        softcap=config.optional_number("final_logit_softcapping", above=0),
    )


def gemma_norms(suffix: str = "") -> Norms:
    """Returns the paths of the four norms of a Gemma layer; `suffix` goes to the end of each name."""
    return Norms(*(f"{name}{suffix}/scale" for name in GEMMA_NORMS))


def _geglu(config: ModelConfig, path: str) -> Mlp:
    require_activation(config, GELU, key="hidden_activation")
    return Mlp(path, config.count("intermediate_size"), "gelu")


READERS: Readers = {
    "gpt_oss": gpt_oss,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
    "olmo3": olmo3,
}
