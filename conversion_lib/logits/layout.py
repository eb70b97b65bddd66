"""Where a MaxText checkpoint keeps each weight, and in which shape, written down from MaxText's own files.

This page is on purpose a second telling of what the converter's mapping tables say: the check must not
share their mistakes. Shapes are those of one layer; a scanned checkpoint stacks the layers on axis 1.
"""

from __future__ import annotations

from conversion_lib.boxes import Shape
from conversion_lib.logits.config import ForwardConfig, IndexerConfig, MlaConfig, MoeConfig

EMBEDDING = "token_embedder/embedding"
FINAL_NORM = "decoder/decoder_norm/scale"
OUTPUT = "decoder/logits_dense/kernel"
NORM_BEFORE_ATTENTION = "pre_self_attention_layer_norm/scale"
NORM_BEFORE_MLP = "post_self_attention_layer_norm/scale"
ROUTED = "DeepSeekMoeBlock_0/MoeBlock_0"
SHARED = "DeepSeekMoeBlock_0/shared_experts"
GATE_BIAS = f"{ROUTED}/gate/bias"
"""Not a kernel with the layers on axis 1: scanned, it is (layers, experts) or (experts, layers)."""


def top_leaves(config: ForwardConfig) -> dict[str, Shape]:
    """Leaves outside the layers, with their shapes. Tied models have no output kernel."""
    leaves: dict[str, Shape] = {EMBEDDING: (config.vocab, config.hidden), FINAL_NORM: (config.hidden,)}
    if not config.tied:
        leaves[OUTPUT] = (config.hidden, config.vocab)
    return leaves


def layer_leaves(config: ForwardConfig, layer: int) -> dict[str, Shape]:
    """Leaves of decoder layer `layer`, relative to its own path, with the shapes of one layer."""
    hidden = config.hidden
    leaves: dict[str, Shape] = {NORM_BEFORE_ATTENTION: (hidden,), NORM_BEFORE_MLP: (hidden,)}
    leaves |= _grouped_query(config) if config.mla is None else _latent(config, config.mla)
    if config.indexer is not None and config.mla is not None:
        leaves |= _indexer(config, config.mla, config.indexer)
    if config.moe is None or layer < config.moe.dense_layers:
        return leaves | _mlp("mlp", hidden, config.mlp)
    return leaves | _experts(config, config.moe)


def layer_path(config: ForwardConfig, layer: int) -> tuple[str, int, int]:
    """The stack that a layer is in: its name, the layer's place in it, and how many layers it has.

    DeepSeek has two stacks, dense_layers and moe_layers, and both count from 0.
    """
    if config.moe is None:
        return "layers", layer, config.layers
    dense = min(config.moe.dense_layers, config.layers)
    if layer < dense:
        return "dense_layers", layer, dense
    return "moe_layers", layer - dense, config.layers - dense


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}/wi_0/kernel": (hidden, width),
        f"{prefix}/wi_1/kernel": (hidden, width),
        f"{prefix}/wo/kernel": (width, hidden),
    }


def _grouped_query(config: ForwardConfig) -> dict[str, Shape]:
    hidden, heads, kv_heads, dim = config.hidden, config.heads, config.kv_heads, config.head_dim
    leaves: dict[str, Shape] = {
        "self_attention/query/kernel": (hidden, heads, dim),
        "self_attention/key/kernel": (hidden, kv_heads, dim),
        "self_attention/value/kernel": (hidden, kv_heads, dim),
        "self_attention/out/kernel": (heads, dim, hidden),
    }
    if config.family == "qwen3":
        leaves |= {"self_attention/query_norm/scale": (dim,), "self_attention/key_norm/scale": (dim,)}
    return leaves


def _latent(config: ForwardConfig, mla: MlaConfig) -> dict[str, Shape]:
    hidden, heads = config.hidden, config.heads
    leaves: dict[str, Shape] = {
        "self_attention/wkv_a/kernel": (hidden, mla.kv_rank + mla.rope_dim),
        "self_attention/kv_norm/scale": (mla.kv_rank,),
        "self_attention/wkv_b/kernel": (mla.kv_rank, heads, mla.nope_dim + mla.value_dim),
        "self_attention/out/kernel": (heads, mla.value_dim, hidden),
    }
    query_dim = mla.nope_dim + mla.rope_dim
    if mla.q_rank is None:
        return leaves | {"self_attention/query/kernel": (hidden, heads, query_dim)}
    return leaves | {
        "self_attention/wq_a/kernel": (hidden, mla.q_rank),
        "self_attention/q_norm/scale": (mla.q_rank,),
        "self_attention/wq_b/kernel": (mla.q_rank, heads, query_dim),
    }


def _indexer(config: ForwardConfig, mla: MlaConfig, indexer: IndexerConfig) -> dict[str, Shape]:
    assert mla.q_rank is not None  # refused by parse_config
    prefix = "self_attention/indexer"
    return {
        f"{prefix}/wq_b/kernel": (mla.q_rank, indexer.heads, indexer.head_dim),
        f"{prefix}/wk/kernel": (config.hidden, indexer.head_dim),
        f"{prefix}/k_norm/scale": (indexer.head_dim,),
        f"{prefix}/k_norm/bias": (indexer.head_dim,),
        f"{prefix}/weights_proj/kernel": (config.hidden, indexer.heads),
    }


def _experts(config: ForwardConfig, moe: MoeConfig) -> dict[str, Shape]:
    leaves: dict[str, Shape] = {
        f"{ROUTED}/gate/kernel": (config.hidden, moe.experts),
        f"{ROUTED}/wi_0": (moe.experts, config.hidden, moe.width),
        f"{ROUTED}/wi_1": (moe.experts, config.hidden, moe.width),
        f"{ROUTED}/wo": (moe.experts, moe.width, config.hidden),
    }
    if moe.sigmoid:
        leaves[GATE_BIAS] = (moe.experts,)
    return leaves | _mlp(SHARED, config.hidden, moe.width * moe.shared)
