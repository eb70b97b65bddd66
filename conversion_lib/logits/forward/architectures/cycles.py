"""gpt-oss, Gemma 2 and 3, Olmo 3: sliding and full attention alternate in cycles, and the scan is over cycles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    LAYER_NORMS,
    QUERY,
    Raw,
    Readers,
    cycle_path,
    grouped_query,
    integer,
    is_power_of_two_root,
    kinds_of_layers,
    mlp,
    model,
    refuse_switches,
    require_activation,
    rope,
    rope_by_kind,
)
from conversion_lib.logits.forward.config import ForwardConfig, Layer, LayerPath, Mlp, Moe, Norms

SLIDING, FULL = "sliding_attention", "full_attention"
GELU = "gelu_pytorch_tanh"
GEMMA_NORMS = ("pre_self_attention_norm", "post_self_attention_norm", "pre_ffw_norm", "post_ffw_norm")

GEMMA_ROWS = {"gemma2": {256000: 256128}, "gemma3": {262208: 262144}}
"""Rows of MaxText's embedding by the `vocab_size` of the published models: padded for Gemma 2, cut for Gemma 3, whose
last rows belong to no token."""

GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
}
"""Defaults of transformers' class: the published files leave out keys with these values."""


def gpt_oss(raw: Raw) -> ForwardConfig:
    """Reads gpt-oss: biases everywhere, attention sinks, and a clamped SwiGLU."""
    if raw.get("attention_bias", True) is not True:
        raise BadInput("config.json: attention_bias is off; the logit check supports gpt-oss with biases only")
    require_activation(raw, "silu")
    attention = grouped_query(raw, head_dim=64, biases=True, out_bias=True, sinks=True)
    window = integer(raw, "sliding_window", 128)
    moe = Moe(
        path="GptOssMlp",
        experts=integer(raw, "num_local_experts"),
        per_token=integer(raw, "num_experts_per_tok", 4),
        width=integer(raw, "intermediate_size"),
        scores="chosen_softmax",
        biases=True,
        clamp=float(raw.get("swiglu_limit", 7.0)),
    )
    kinds = kinds_of_layers(raw, (SLIDING, FULL))
    layers = tuple(
        Layer(
            cycle_path(n, 2, len(kinds)),
            LAYER_NORMS,
            "GptOssAttention",
            replace(attention, window=window if kind == SLIDING else None),
            moe,
        )
        for n, kind in enumerate(kinds)
    )
    return model(raw, layers, eps=1e-5)


def olmo3(raw: Raw) -> ForwardConfig:
    """Reads Olmo 3: norms only after attention and MLP, and query and key norms over all heads together."""
    refuse_switches(raw, "attention_bias")
    dense, window = mlp(raw), integer(raw, "sliding_window", 4096)
    norms = Norms(None, "post_self_attention_layer_norm/scale", None, "post_mlp_layer_norm/scale")
    kinds = kinds_of_layers(raw, (SLIDING, SLIDING, SLIDING, FULL))

    def layer(n: int, kind: str) -> Layer:
        dim = integer(raw, "head_dim", integer(raw, "hidden_size") // integer(raw, "num_attention_heads"))
        rotation = rope_by_kind(raw, kind, dim, local_theta=float(raw.get("rope_theta") or 5e5), theta=5e5)
        sliding = window if kind == SLIDING else None
        attention = grouped_query(raw, norms="all_heads", rope=rotation, window=sliding)
        return Layer(cycle_path(n, 4, len(kinds)), norms, "attention", attention, dense)

    return model(raw, tuple(layer(n, kind) for n, kind in enumerate(kinds)), eps=1e-5)


def gemma2(raw: Raw) -> ForwardConfig:
    """Reads Gemma 2: a MaxText layer holds two layers, and the converter divides the query by sqrt(head_dim)."""
    refuse_switches(raw, "attention_bias")
    window, softcap = integer(raw, "sliding_window", 4096), raw.get("attn_logit_softcapping", 50.0)
    kinds = kinds_of_layers(raw, (SLIDING, FULL))

    def layer(n: int, kind: str) -> Layer:
        local = kind == SLIDING
        name = "local" if local else "global"
        attention = grouped_query(
            raw,
            head_dim=256,
            rope=rope(raw, integer(raw, "head_dim", 256), pairs=False),
            scale=1.0,
            window=window if local else None,
            softcap=softcap,
        )
        path = LayerPath("layers", (n // 2,), (len(kinds) // 2,), f"layers_{n // 2}")
        return Layer(path, gemma_norms(f"_{name}"), f"self_attention_{name}", attention, _geglu(raw, f"mlp_{name}"))

    layers = tuple(layer(n, kind) for n, kind in enumerate(kinds))
    rounded = () if is_power_of_two_root(integer(raw, "head_dim", 256)) else (QUERY,)
    factor = float(np.float32(integer(raw, "hidden_size") ** 0.5))
    return _gemma(raw, layers, factor, rounded, softcap=raw.get("final_logit_softcapping", 30.0))


def gemma3(raw: Raw) -> ForwardConfig:
    """Reads Gemma 3: norms on each head's query and key, and an embedding factor rounded to bfloat16."""
    raw = GEMMA3_DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    refuse_switches(raw, "attention_bias", "use_bidirectional_attention")
    window, dim = integer(raw, "sliding_window"), integer(raw, "head_dim")
    scale = integer(raw, "query_pre_attn_scalar") ** -0.5
    kinds = kinds_of_layers(raw, (*[SLIDING] * 5, FULL))
    local_theta = float(raw.get("rope_local_base_freq") or 1e4)

    def layer(n: int, kind: str) -> Layer:
        rotation = rope_by_kind(raw, kind, dim, local_theta=local_theta, theta=1e6)
        sliding = window if kind == SLIDING else None
        attention = grouped_query(raw, norms="head", rope=rotation, scale=scale, window=sliding)
        return Layer(cycle_path(n, 6, len(kinds)), gemma_norms(), "self_attention", attention, _geglu(raw, "mlp"))

    layers = tuple(layer(n, kind) for n, kind in enumerate(kinds))
    factor = float(ml_dtypes.bfloat16(integer(raw, "hidden_size") ** 0.5))
    return _gemma(raw, layers, factor, (), softcap=raw.get("final_logit_softcapping"))


def _gemma(raw: Raw, layers: tuple[Layer, ...], factor: float, rounded: tuple[str, ...], **more: Any) -> ForwardConfig:
    vocab = integer(raw, "vocab_size", 256000)
    mantissa = np.frexp(factor)[0]
    if mantissa != 0.5:  # not a power of two: the scaled embedding is rounded
        rounded = (*rounded, "token_embedder/embedding")
    rows = GEMMA_ROWS[raw["model_type"].removesuffix("_text")].get(vocab, vocab)
    return model(raw, layers, tied=True, embedding_scale=factor, rounded=rounded, rows=rows, **more)


def gemma_norms(suffix: str = "") -> Norms:
    """Returns the paths of the four norms of a Gemma layer; `suffix` goes to the end of each name."""
    return Norms(*(f"{name}{suffix}/scale" for name in GEMMA_NORMS))


def _geglu(raw: Raw, path: str) -> Mlp:
    key = "hidden_activation" if raw.get("hidden_activation") else "hidden_act"
    require_activation(raw, GELU, key=key)
    return Mlp(path, integer(raw, "intermediate_size"), "gelu")


READERS: Readers = {
    "gpt_oss": gpt_oss,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
    "olmo3": olmo3,
}
