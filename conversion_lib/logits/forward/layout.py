"""The path and shape of each weight in a MaxText checkpoint, as MaxText's own model files define them.

This repeats the converter's mapping tables on purpose, because the check must not share their mistakes. Shapes are
those of one layer; a scanned checkpoint stacks the layers on axis 1.
"""

from __future__ import annotations

from dataclasses import fields

from conversion_lib.core.boxes import Shape
from conversion_lib.logits.forward.config import (
    DeltaNet,
    ForwardConfig,
    GroupedQuery,
    Indexer,
    Latent,
    Layer,
    Mlp,
    Moe,
    PerLayerInput,
)

EMBEDDING = "token_embedder/embedding"
FINAL_NORM = "decoder/decoder_norm/scale"
OUTPUT = "decoder/logits_dense/kernel"
LAYER_SCALAR = "layer_scalar"
PER_LAYER = "decoder/per_layer_embedder"


def top_leaves(config: ForwardConfig) -> dict[str, Shape]:
    """Returns the shapes of the leaves outside the layers, by path. Tied models have no output kernel."""
    leaves: dict[str, Shape] = {EMBEDDING: (config.rows or config.vocab, config.hidden), FINAL_NORM: (config.hidden,)}
    if not config.tied:
        leaves[OUTPUT] = (config.hidden, config.vocab)
    if config.per_layer_input is not None:
        all_layers = len(config.layers) * config.per_layer_input.width
        leaves |= {
            f"{PER_LAYER}/embed_tokens_per_layer": (config.vocab, all_layers),
            f"{PER_LAYER}/per_layer_model_projection/kernel": (config.hidden, all_layers),
            f"{PER_LAYER}/per_layer_projection_norm/scale": (config.per_layer_input.width,),
        }
    return leaves


def layer_leaves(layer: Layer, config: ForwardConfig) -> dict[str, Shape]:
    """Returns the shapes of the leaves of a decoder layer, unstacked, by path below the layer."""
    norms, hidden = layer.norms, config.hidden
    paths = (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp)
    leaves: dict[str, Shape] = {path: (hidden,) for path in paths if path is not None}
    leaves |= {f"{layer.attention_path}/{path}": shape for path, shape in _attention(layer.attention, hidden).items()}
    if config.layer_scalars:
        leaves[LAYER_SCALAR] = (1,)
    if config.per_layer_input is not None:
        leaves |= _per_layer_input(config.per_layer_input, hidden)
    if isinstance(layer.feed_forward, Mlp):
        return leaves | _mlp(layer.feed_forward, hidden)
    return leaves | _experts(layer.feed_forward, hidden)


def _per_layer_input(entry: PerLayerInput, hidden: int) -> dict[str, Shape]:
    return {
        "per_layer_input_gate/kernel": (hidden, entry.width),
        "per_layer_projection/kernel": (entry.width, hidden),
        "post_per_layer_input_norm/scale": (hidden,),
    }


def _mlp(mlp: Mlp, hidden: int) -> dict[str, Shape]:
    return {
        f"{mlp.path}/wi_0/kernel": (hidden, mlp.width),
        f"{mlp.path}/wi_1/kernel": (hidden, mlp.width),
        f"{mlp.path}/wo/kernel": (mlp.width, hidden),
    }


def _attention(attention: GroupedQuery | Latent | DeltaNet, hidden: int) -> dict[str, Shape]:
    if isinstance(attention, GroupedQuery):
        return _grouped_query(attention, hidden)
    return _latent(attention, hidden) if isinstance(attention, Latent) else _delta_net(attention, hidden)


def _grouped_query(attention: GroupedQuery, hidden: int) -> dict[str, Shape]:
    heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.head_dim
    projections = {"query": (heads, 2 * dim if attention.gated else dim)}
    if attention.keys != "earlier":
        projections["key"] = (kv_heads, dim)
    if attention.keys == "own":
        projections["value"] = (kv_heads, dim)
    leaves: dict[str, Shape] = {f"{name}/kernel": (hidden, *shape) for name, shape in projections.items()}
    leaves["out/kernel"] = (heads * dim, hidden) if attention.gated else (heads, dim, hidden)
    if attention.biases:
        leaves |= {f"{name}/bias": shape for name, shape in projections.items()}
    if attention.out_bias:
        leaves["out/bias"] = (hidden,)
    if attention.sinks:
        leaves["sinks"] = (heads,)
    if attention.norms == "none":
        return leaves
    normed = {"query": heads, "key": kv_heads}
    for name in normed.keys() & projections.keys():
        leaves[f"{name}_norm/scale"] = (dim if attention.norms == "head" else normed[name] * dim,)
    return leaves


def _delta_net(net: DeltaNet, hidden: int) -> dict[str, Shape]:
    values = net.value_heads * net.value_dim
    return {
        "in_proj_qkvz/kernel": (hidden, net.convolved + values),
        "in_proj_ba/kernel": (hidden, 2 * net.value_heads),
        "conv1d/kernel": (net.taps, 1, net.convolved),
        "A_log": (net.value_heads,),
        "dt_bias": (net.value_heads,),
        "norm/rms_norm/scale": (net.value_dim,),
        "out_proj/kernel": (values, hidden),
    }


def _latent(attention: Latent, hidden: int) -> dict[str, Shape]:
    heads, turning = attention.heads, attention.rope.dim
    leaves: dict[str, Shape] = {
        "wkv_a/kernel": (hidden, attention.kv_rank + turning),
        "kv_norm/scale": (attention.kv_rank,),
        "wkv_b/kernel": (attention.kv_rank, heads, attention.nope_dim + attention.value_dim),
        "out/kernel": (heads, attention.value_dim, hidden),
    }
    query_dim = attention.nope_dim + turning
    if attention.q_rank is None:
        return leaves | {"query/kernel": (hidden, heads, query_dim)}
    if attention.indexer is not None:
        leaves |= _indexer(attention.indexer, attention.q_rank, hidden)
    return leaves | {
        "wq_a/kernel": (hidden, attention.q_rank),
        "q_norm/scale": (attention.q_rank,),
        "wq_b/kernel": (attention.q_rank, heads, query_dim),
    }


def _indexer(indexer: Indexer, q_rank: int, hidden: int) -> dict[str, Shape]:
    return {
        "indexer/wq_b/kernel": (q_rank, indexer.heads, indexer.head_dim),
        "indexer/wk/kernel": (hidden, indexer.head_dim),
        "indexer/k_norm/scale": (indexer.head_dim,),
        "indexer/k_norm/bias": (indexer.head_dim,),
        "indexer/weights_proj/kernel": (hidden, indexer.heads),
    }


def gate_bias(moe: Moe) -> str:
    """Returns the path of the gate's bias below the layer."""
    return f"{moe.path}/gate/bias"


def _experts(moe: Moe, hidden: int) -> dict[str, Shape]:
    leaves: dict[str, Shape] = {
        f"{moe.path}/gate/kernel": (hidden, moe.experts),
        f"{moe.path}/wi_0": (moe.experts, hidden, moe.width),
        f"{moe.path}/wi_1": (moe.experts, hidden, moe.width),
        f"{moe.path}/wo": (moe.experts, moe.width, hidden),
    }
    if moe.correction_bias or moe.biases:
        leaves[gate_bias(moe)] = (moe.experts,)
    if moe.biases:
        leaves |= {
            f"{moe.path}/wi_0_bias": (moe.experts, moe.width),
            f"{moe.path}/wi_1_bias": (moe.experts, moe.width),
            f"{moe.path}/wo_bias": (moe.experts, hidden),
        }
    if moe.expert_scales:
        leaves[f"{moe.path}/per_expert_scale"] = (moe.experts,)
    if moe.norms is not None:
        leaves |= {getattr(moe.norms, item.name): (hidden,) for item in fields(moe.norms)}
    if moe.shared_gate is not None:
        leaves[moe.shared_gate] = (hidden, 1)
    return leaves if moe.shared is None else leaves | _mlp(moe.shared, hidden)
