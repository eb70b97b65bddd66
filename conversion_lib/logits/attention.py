"""Attention of one layer: grouped queries (Llama, Qwen 3) and latent (DeepSeek), with V3.2's sparse choice.

All prompts stand one after the other in a single sequence of `tokens`; a mask keeps each to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.logits.config import ForwardConfig, IndexerConfig, MlaConfig
from conversion_lib.logits.rope import rotate, rotation_tables, yarn_mscale
from conversion_lib.logits.weights import Leaves

SCORE_BYTES = 256 << 20
"""Attention scores held at a time; queries go in blocks of that size."""

LATENT_EPS = 1e-6
"""Of the norms inside latent attention: DeepSeek's own code and transformers leave `rms_norm_eps` aside here."""


@dataclass(frozen=True)
class Sequence:
    """Where each token stands: rotation tables, and which tokens each may look at, bool (tokens, tokens)."""

    tables: tuple[jax.Array, jax.Array]
    visible: jax.Array


def lay_out(config: ForwardConfig, lengths: list[int]) -> Sequence:
    """Prompts of `lengths` packed into one sequence: positions restart, and each sees its own past only."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    prompt = np.repeat(np.arange(len(lengths)), lengths)
    order = np.arange(len(positions))
    visible = (prompt[:, None] == prompt) & (order[:, None] >= order)
    return Sequence(rotation_tables(config.rope, positions), jnp.asarray(visible))


@partial(jax.jit, static_argnames="eps")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv:1910.07467) over the last axis; x float32 (..., dim), scale (dim,)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm (arXiv:1607.06450) over the last axis; x float32 (..., dim), scale and bias (dim,)."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps) * scale + bias


def attention(x: jax.Array, leaves: Leaves, config: ForwardConfig, sequence: Sequence) -> jax.Array:
    """What attention adds to the stream: x is the normed stream, float32 (tokens, hidden), as is the result."""
    if config.mla is None:
        return grouped_query_attention(x, leaves, config, sequence)
    return latent_attention(x, leaves, config, config.mla, sequence)


def grouped_query_attention(x: jax.Array, leaves: Leaves, config: ForwardConfig, sequence: Sequence) -> jax.Array:
    """Grouped-query attention (arXiv:2305.13245); x and the result float32 (tokens, hidden).

    Llama's query kernel carries the factor 1 / sqrt(head_dim) in a MaxText checkpoint; Qwen 3, which norms
    query and key per head, applies it at run time.
    """
    query = leaves.contract(x, "self_attention/query/kernel")
    key = leaves.contract(x, "self_attention/key/kernel")
    value = leaves.contract(x, "self_attention/value/kernel")
    scale = 1.0
    if config.family == "qwen3":
        query = rms_norm(query, leaves.read("self_attention/query_norm/scale"), config.eps)
        key = rms_norm(key, leaves.read("self_attention/key_norm/scale"), config.eps)
        scale = config.head_dim**-0.5
    query = rotate(query, sequence.tables, pairs=config.rope.pairs)
    key = rotate(key, sequence.tables, pairs=config.rope.pairs)
    mixed = _attend(query, key, value, sequence.visible, scale)
    return leaves.contract(mixed, "self_attention/out/kernel", axes=2)


def latent_attention(
    x: jax.Array, leaves: Leaves, config: ForwardConfig, mla: MlaConfig, sequence: Sequence
) -> jax.Array:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1.2 and 2.1.3; V3 report, section 2.1.1).

    x and the result float32 (tokens, hidden). Only `rope_dim` dimensions of a head turn, and their key is
    shared by all heads. Under YaRN the softmax's scale takes the square of its temperature.
    """
    low_rank, query = _latent_query(x, leaves, mla)
    latent = leaves.contract(x, "self_attention/wkv_a/kernel")
    compressed, turning_key = jnp.split(latent, [mla.kv_rank], axis=-1)
    compressed = rms_norm(compressed, leaves.read("self_attention/kv_norm/scale"), LATENT_EPS)
    still_key, value = jnp.split(leaves.contract(compressed, "self_attention/wkv_b/kernel"), [mla.nope_dim], axis=-1)

    still_query, turning_query = jnp.split(query, [mla.nope_dim], axis=-1)
    turned_query = rotate(turning_query, sequence.tables, pairs=config.rope.pairs)
    turned_key = rotate(turning_key[:, None, :], sequence.tables, pairs=config.rope.pairs)
    turned_key = jnp.broadcast_to(turned_key, (*still_key.shape[:2], mla.rope_dim))
    query = jnp.concatenate([still_query, turned_query], axis=-1)
    key = jnp.concatenate([still_key, turned_key], axis=-1)

    visible = sequence.visible
    if config.indexer is not None:
        visible = chosen_tokens(x, low_rank, leaves, config.indexer, mla.rope_dim, sequence)
    mixed = _attend(query, key, value, visible, latent_scale(config, mla))
    return leaves.contract(mixed, "self_attention/out/kernel", axes=2)


def latent_scale(config: ForwardConfig, mla: MlaConfig) -> float:
    """1 / sqrt(head width), times YaRN's temperature squared where `mscale_all_dim` asks for it (arXiv:2309.00071,
    section 3.4: both query and key are stretched by it)."""
    scale = (mla.nope_dim + mla.rope_dim) ** -0.5
    weight = config.rope.values.get("mscale_all_dim")
    if config.rope.kind != "default" and weight:
        scale *= yarn_mscale(config.rope.values["factor"], weight) ** 2
    return float(scale)


def _latent_query(x: jax.Array, leaves: Leaves, mla: MlaConfig) -> tuple[jax.Array, jax.Array]:
    """The normed low-rank query (x itself where there is none) and the query, (tokens, heads, nope + rope)."""
    if mla.q_rank is None:
        return x, leaves.contract(x, "self_attention/query/kernel")
    low_rank = leaves.contract(x, "self_attention/wq_a/kernel")
    low_rank = rms_norm(low_rank, leaves.read("self_attention/q_norm/scale"), LATENT_EPS)
    return low_rank, leaves.contract(low_rank, "self_attention/wq_b/kernel")


def chosen_tokens(
    x: jax.Array, low_rank: jax.Array, leaves: Leaves, indexer: IndexerConfig, rope_dim: int, sequence: Sequence
) -> jax.Array:
    """DeepSeek sparse attention (DeepSeek-V3.2 report, section 2.1): the `top_k` tokens that each token looks at.

    x: the normed stream, float32 (tokens, hidden); low_rank: the normed low-rank query, (tokens, q_rank); the
    result is bool (tokens, tokens). The indexer rotates the first `rope_dim` dimensions, in halves, unlike the
    attention that it serves. Its fp8 and Hadamard transform are a matter of speed: the transform keeps products.
    Among equal scores the earlier token is taken, which torch leaves open.
    """
    prefix = "self_attention/indexer"
    query = leaves.contract(low_rank, f"{prefix}/wq_b/kernel")
    key = leaves.contract(x, f"{prefix}/wk/kernel")
    key = layer_norm(key, leaves.read(f"{prefix}/k_norm/scale"), leaves.read(f"{prefix}/k_norm/bias"), LATENT_EPS)
    head_weights = leaves.contract(x, f"{prefix}/weights_proj/kernel") * indexer.heads**-0.5

    def turn(states: jax.Array) -> jax.Array:
        turning, still = jnp.split(states, [rope_dim], axis=-1)
        return jnp.concatenate([rotate(turning, sequence.tables, pairs=False), still], axis=-1)

    query, key = turn(query), turn(key[:, None, :])[:, 0]
    count = min(indexer.top_k, len(x))
    blocks = [
        _choose(query[rows], key, head_weights[rows], sequence.visible[rows], count, indexer.head_dim**-0.5)
        for rows in _row_blocks(len(x), indexer.heads * len(x) * 4)
    ]
    return jnp.concatenate(blocks)


@partial(jax.jit, static_argnames=("count", "scale"))
def _choose(
    query: jax.Array, key: jax.Array, head_weights: jax.Array, visible: jax.Array, count: int, scale: float
) -> jax.Array:
    """query (rows, heads, dim), key (tokens, dim), head_weights (rows, heads), visible (rows, tokens)."""
    scores = jax.nn.relu(jnp.einsum("nhd,td->nht", query, key) * scale)
    scores = jnp.where(visible, jnp.einsum("nh,nht->nt", head_weights, scores), -jnp.inf)
    _, best = jax.lax.top_k(scores, count)
    chosen = jnp.zeros(visible.shape, bool).at[jnp.arange(len(visible))[:, None], best].set(True)
    return chosen & visible


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float) -> jax.Array:
    """Softmax attention; query (tokens, heads, d), key (tokens, kv heads, d), value (tokens, kv heads, e), all
    float32; the result is (tokens, heads, e). Head h reads kv head h // (heads / kv heads)."""
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(tokens, kv_heads, heads // kv_heads, dim)
    blocks = [
        _attend_rows(grouped[rows], key, value, visible[rows], scale)
        for rows in _row_blocks(tokens, heads * tokens * 4)
    ]
    return jnp.concatenate(blocks).reshape(tokens, heads, value.shape[-1])


@partial(jax.jit, static_argnames="scale")
def _attend_rows(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float) -> jax.Array:
    scores = jnp.einsum("nkgd,tkd->kgnt", query, key) * scale
    shares = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("kgnt,tke->nkge", shares, value)


def _row_blocks(tokens: int, bytes_a_row: int) -> Iterator[slice]:
    rows = max(1, SCORE_BYTES // bytes_a_row)
    for start in range(0, tokens, rows):
        yield slice(start, min(start + rows, tokens))
