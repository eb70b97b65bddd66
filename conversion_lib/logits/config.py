"""What the forward pass needs to know of a model, read from the Hugging Face `config.json`.

Both of transformers' spellings are taken: `rope_parameters` (5.x), or `rope_theta` with `rope_scaling`
(what most files on the Hub have). Where a key is missing, the default is that of transformers' class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conversion_lib.errors import BadInput

SUPPORTED = ("llama", "qwen3", "deepseek_v2", "deepseek_v3", "deepseek_v32")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: `dim` rotated dimensions; `values` holds the keys of the scaling's kind."""

    kind: str
    dim: int
    theta: float
    pairs: bool
    """True where the checkpoint holds the two halves of a rotation side by side, (0, 1), (2, 3), ...;
    False where dimension i turns with i + dim / 2."""
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1)."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class IndexerConfig:
    """The indexer of DeepSeek sparse attention (DeepSeek-V3.2 report, section 2.1)."""

    heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Routed and shared experts; the first `dense_layers` layers have a plain MLP instead."""

    dense_layers: int
    experts: int
    per_token: int
    width: int
    shared: int
    groups: int
    groups_kept: int
    scaling: float
    normalize: bool
    sigmoid: bool
    """True for DeepSeek-V3's sigmoid scores with a correction bias, False for V2's softmax."""
    grouped: bool
    """Whether experts are chosen within the best groups only."""


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """Sizes and switches of one model."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    eps: float
    tied: bool
    max_positions: int
    rope: RopeConfig
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    indexer: IndexerConfig | None = None


def parse_config(raw: Mapping[str, Any]) -> ForwardConfig:
    """The contents of a `config.json` as a ForwardConfig.

    Raises BadInput for an architecture or a setting that the forward pass does not have.
    """
    family = str(raw.get("model_type"))
    if family not in SUPPORTED:
        raise BadInput(f"no logit check for model_type {family!r}; there is one for {', '.join(SUPPORTED)}")
    _refuse_unknown_settings(raw)
    deepseek = family.startswith("deepseek")
    heads = _integer(raw, "num_attention_heads")
    hidden = _integer(raw, "hidden_size")
    head_dim = _integer(raw, "qk_rope_head_dim") if deepseek else _head_dim(raw, family, hidden, heads)
    return ForwardConfig(
        family=family,
        layers=_integer(raw, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads if deepseek else raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp=_integer(raw, "intermediate_size"),
        vocab=_integer(raw, "vocab_size"),
        eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_positions=_integer(raw, "max_position_embeddings"),
        rope=_rope(raw, family, head_dim),
        mla=_mla(raw) if deepseek else None,
        moe=_moe(raw, family) if deepseek else None,
        indexer=_indexer(raw) if family == "deepseek_v32" else None,
    )


def _refuse_unknown_settings(raw: Mapping[str, Any]) -> None:
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if raw.get(key):
            raise BadInput(f"config.json: {key} is on, which the logit check does not have")
    if raw.get("hidden_act", "silu") != "silu":
        raise BadInput(f"config.json: hidden_act {raw['hidden_act']!r}, where the logit check has only 'silu'")


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise BadInput(f"config.json: {key} should be a positive integer, not {value!r}")
    return value


def _head_dim(raw: Mapping[str, Any], family: str, hidden: int, heads: int) -> int:
    if raw.get("head_dim"):
        return _integer(raw, "head_dim")
    return 128 if family == "qwen3" else hidden // heads


def _rope(raw: Mapping[str, Any], family: str, dim: int) -> RopeConfig:
    values = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    kind = str(values.get("rope_type") or values.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise BadInput(f"config.json: RoPE scaling {kind!r}; the logit check has {', '.join(ROPE_KINDS)}")
    partial = values.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise BadInput(f"config.json: partial_rotary_factor {partial}, which the logit check does not have")
    values.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    if values.get("factor") is None:
        values["factor"] = raw["max_position_embeddings"] / values["original_max_position_embeddings"]
    theta = float(values.get("rope_theta") or raw.get("rope_theta") or DEFAULT_THETA)
    # MaxText interleaves Llama's halves when it converts; DeepSeek's come interleaved; Qwen 3's stay halves
    pairs = family != "qwen3" and bool(raw.get("rope_interleave", True))
    return RopeConfig(kind, dim, theta, pairs, values)


def _mla(raw: Mapping[str, Any]) -> MlaConfig:
    return MlaConfig(
        q_rank=raw.get("q_lora_rank"),
        kv_rank=_integer(raw, "kv_lora_rank"),
        nope_dim=_integer(raw, "qk_nope_head_dim"),
        rope_dim=_integer(raw, "qk_rope_head_dim"),
        value_dim=_integer(raw, "v_head_dim"),
    )


def _moe(raw: Mapping[str, Any], family: str) -> MoeConfig:
    sigmoid = family != "deepseek_v2"
    method = raw.get("topk_method") or "greedy"
    if not sigmoid and method not in ("greedy", "group_limited_greedy"):
        raise BadInput(f"config.json: topk_method {method!r}; the logit check has greedy and group_limited_greedy")
    grouped = sigmoid or method == "group_limited_greedy"
    return MoeConfig(
        dense_layers=int(raw.get("first_k_dense_replace", 3 if sigmoid else 0)),
        experts=_integer(raw, "n_routed_experts"),
        per_token=_integer(raw, "num_experts_per_tok"),
        width=_integer(raw, "moe_intermediate_size"),
        shared=_integer(raw, "n_shared_experts"),
        groups=_integer(raw, "n_group") if grouped else 1,
        groups_kept=_integer(raw, "topk_group") if grouped else 1,
        scaling=float(raw.get("routed_scaling_factor", 2.5 if sigmoid else 1.0)),
        normalize=sigmoid and bool(raw.get("norm_topk_prob", True)),
        sigmoid=sigmoid,
        grouped=grouped,
    )


def _indexer(raw: Mapping[str, Any]) -> IndexerConfig:
    _integer(raw, "q_lora_rank")  # the indexer's queries come from the low-rank query
    return IndexerConfig(
        heads=_integer(raw, "index_n_heads"),
        head_dim=_integer(raw, "index_head_dim"),
        top_k=_integer(raw, "index_topk"),
    )
