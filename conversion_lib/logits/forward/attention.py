"""Softmax attention of one layer: grouped-query attention, and DeepSeek's latent attention with V3.2's indexer.

All prompts are packed into a single sequence of `tokens`. A mask keeps them from attending to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.config import GroupedQuery, Indexer, Latent, RopeConfig
from conversion_lib.logits.forward.rope import rotate, rotation_tables
from conversion_lib.logits.forward.weights import Leaves

KeysAndValues = tuple[jax.Array, jax.Array]
"""Keys and values of one layer after norms and RoPE: float32 (tokens, kv heads, dim) each."""

INDEXER_EPS = 1e-6
"""Of the norm of an indexer's keys: `rms_norm_eps` is not for it."""


class Prompts:
    """Several prompts packed into one sequence: positions restart at 0, and each prompt sees only its own past.

    Args:
        lengths: Tokens of each prompt.
        score_bytes: Bytes of float32 attention scores held at a time. Queries are processed in blocks that fit.

    Attributes:
        positions: Position of each token within its prompt, int64 (tokens,).
    """

    def __init__(self, lengths: list[int], score_bytes: int) -> None:
        self.positions = np.concatenate([np.arange(length) for length in lengths])
        self._prompt = np.repeat(np.arange(len(lengths)), lengths)
        self.score_bytes = score_bytes
        self._tables: dict[tuple[object, ...], tuple[jax.Array, jax.Array]] = {}

    def visible(self, window: int | None = None) -> jax.Array:
        """Makes the causal mask within each prompt.

        Args:
            window: How many tokens a query attends to, itself included. None: all before it.

        Returns:
            bool (tokens, tokens): [query, key] is True where the query attends to the key.
        """
        order = np.arange(len(self.positions), dtype=np.int32)
        seen = (self._prompt[:, None] == self._prompt) & (order[:, None] >= order)
        return jnp.asarray(seen if window is None else seen & (order[:, None] - order < window))

    def tables(self, rope: RopeConfig) -> tuple[jax.Array, jax.Array]:
        """Returns cosine and sine of every token, float32 (tokens, rope.dim / 2) each, computed once for a `rope`."""
        key = (rope.kind, rope.dim, rope.theta, repr(sorted(rope.values.items())))
        if key not in self._tables:
            self._tables[key] = rotation_tables(rope, self.positions)
        return self._tables[key]


@partial(jax.jit, static_argnames="eps")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Applies RMSNorm (arXiv:1910.07467) over the last axis: x is float32 (..., dim), scale (dim,)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Applies LayerNorm (arXiv:1607.06450) over the last axis: x is float32 (..., dim), scale and bias (dim,)."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps) * scale + bias


def grouped_query_attention(
    x: jax.Array,
    leaves: Leaves,
    path: str,
    config: GroupedQuery,
    eps: float,
    prompts: Prompts,
    earlier: KeysAndValues | None = None,
) -> tuple[jax.Array, KeysAndValues]:
    """Computes grouped-query attention (arXiv:2305.13245).

    Sinks: gpt-oss, as transformers' `GptOssAttention`. Output gate: `Qwen3NextAttention`. Shared keys and values:
    `Gemma4TextAttention`.

    Args:
        x: The normed residual stream, float32 (tokens, hidden).
        leaves: The layer's weights.
        path: Path of the attention below the layer.
        config: Sizes and switches.
        eps: Epsilon of the query, key and value norms.
        prompts: Positions and mask of the tokens.
        earlier: Keys and values of layer `config.keys_from`. Needed where `config.keys` is "earlier".

    Returns:
        The output, float32 (tokens, hidden), before it is added to the stream; and the keys and values that were
        used, for later layers that share them.
    """
    tables, pairs = prompts.tables(config.rope), config.rope.pairs
    query, gate = _project(x, leaves, f"{path}/query", config.biases), None
    if config.gated:
        query, gate = jnp.split(query, 2, axis=-1)
    query = rotate(_head_norm(query, leaves, f"{path}/query_norm/scale", config, eps), tables, pairs=pairs)
    if config.keys == "earlier":
        assert earlier is not None
        key, value = earlier
    else:
        key = _project(x, leaves, f"{path}/key", config.biases)
        value = key if config.keys == "as_values" else _project(x, leaves, f"{path}/value", config.biases)
        key = rotate(_head_norm(key, leaves, f"{path}/key_norm/scale", config, eps), tables, pairs=pairs)
        value = rms_norm(value, jnp.ones(config.head_dim), eps) if config.value_norm else value
    sinks = leaves.read(f"{path}/sinks") if config.sinks else None
    visible = prompts.visible(config.window)
    mixed = _attend(query, key, value, visible, config.scale, config.softcap, sinks, prompts.score_bytes)
    if gate is not None:
        flat = (mixed * jax.nn.sigmoid(gate)).reshape(len(x), -1)
        return leaves.contract(flat, f"{path}/out/kernel"), (key, value)
    out = leaves.contract(mixed, f"{path}/out/kernel", axes=2)
    return out + leaves.read(f"{path}/out/bias") if config.out_bias else out, (key, value)


def _project(x: jax.Array, leaves: Leaves, path: str, bias: bool) -> jax.Array:
    projected = leaves.contract(x, f"{path}/kernel")
    return projected + leaves.read(f"{path}/bias") if bias else projected


def _head_norm(x: jax.Array, leaves: Leaves, path: str, config: GroupedQuery, eps: float) -> jax.Array:
    """Norms x, float32 (tokens, heads, dim), over each head, over all heads together, or not at all."""
    if config.norms == "none":
        return x
    rows = x if config.norms == "head" else x.reshape(len(x), -1)
    normed: jax.Array = rms_norm(rows, leaves.read(path) + config.norm_offset, eps).reshape(x.shape)
    return normed


def latent_attention(
    x: jax.Array,
    leaves: Leaves,
    path: str,
    config: Latent,
    prompts: Prompts,
    original: Array | None = None,
    tie: float = 0.0,
) -> jax.Array:
    """Computes multi-head latent attention (DeepSeek-V2 report, sections 2.1.2 and 2.1.3; V3 report, section 2.1.1).

    RoPE rotates only `rope.dim` dimensions of a head. All heads share the key of these dimensions.

    Args:
        x: The normed residual stream, float32 (tokens, hidden).
        leaves: The layer's weights.
        path: Path of the attention below the layer.
        config: Sizes, and the indexer where the model has one.
        prompts: Positions and mask of the tokens.
        original: What the original's indexer chose, as in `chosen_tokens`.
        tie: As in `chosen_tokens`.

    Returns:
        float32 (tokens, hidden), before it is added to the stream.
    """
    low_rank, query = _latent_query(x, leaves, path, config)
    latent = leaves.contract(x, f"{path}/wkv_a/kernel")
    compressed, turning_key = jnp.split(latent, [config.kv_rank], axis=-1)
    compressed = rms_norm(compressed, leaves.read(f"{path}/kv_norm/scale"), config.norm_eps)
    still_key, value = jnp.split(leaves.contract(compressed, f"{path}/wkv_b/kernel"), [config.nope_dim], axis=-1)

    tables, pairs = prompts.tables(config.rope), config.rope.pairs
    still_query, turning_query = jnp.split(query, [config.nope_dim], axis=-1)
    turned_key = rotate(turning_key[:, None, :], tables, pairs=pairs)
    turned_key = jnp.broadcast_to(turned_key, (*still_key.shape[:2], config.rope.dim))
    query = jnp.concatenate([still_query, rotate(turning_query, tables, pairs=pairs)], axis=-1)
    key = jnp.concatenate([still_key, turned_key], axis=-1)

    visible = prompts.visible()
    if config.indexer is not None:
        indexer = f"{path}/indexer"
        visible = chosen_tokens(x, low_rank, leaves, indexer, config.indexer, config.rope, prompts, original, tie)
    mixed = _attend(query, key, value, visible, config.scale, None, None, prompts.score_bytes)
    return leaves.contract(mixed, f"{path}/out/kernel", axes=2)


def _latent_query(x: jax.Array, leaves: Leaves, path: str, config: Latent) -> tuple[jax.Array, jax.Array]:
    """The normed low-rank query (x itself without one), and the query, float32 (tokens, heads, nope + rope)."""
    if config.q_rank is None:
        return x, leaves.contract(x, f"{path}/query/kernel")
    low_rank = leaves.contract(x, f"{path}/wq_a/kernel")
    low_rank = rms_norm(low_rank, leaves.read(f"{path}/q_norm/scale"), config.norm_eps)
    return low_rank, leaves.contract(low_rank, f"{path}/wq_b/kernel")


def chosen_tokens(
    x: jax.Array,
    low_rank: jax.Array,
    leaves: Leaves,
    path: str,
    indexer: Indexer,
    rope: RopeConfig,
    prompts: Prompts,
    original: Array | None = None,
    tie: float = 0.0,
) -> jax.Array:
    """Chooses the `top_k` tokens that each query attends to (DeepSeek-V3.2 report, section 2.1, the indexer).

    As transformers' `DeepseekV32Indexer`. RoPE rotates the first `rope.dim` dimensions in halves, unlike in the
    attention itself. DeepSeek's code also applies fp8 and a Hadamard transform. Both are for speed only, and the
    transform keeps dot products, so they are left out. Among equal scores the earlier token wins; torch leaves that
    open.

    Args:
        x: The normed residual stream, float32 (tokens, hidden).
        low_rank: The normed low-rank query, float32 (tokens, q_rank).
        leaves: The layer's weights.
        path: Path of the indexer below the layer.
        indexer: Its sizes.
        rope: RoPE of the attention.
        prompts: Positions and mask of the tokens.
        original: Indices of the tokens that the original chose, (tokens, top_k), where known. They are used for each
            query where they are as good a choice, since float32 cannot tell some scores apart.
        tie: By how much they may be worse, as a share of the query's largest absolute score.

    Returns:
        bool (tokens, tokens): [query, key] is True where the query attends to the key.
    """
    query = leaves.contract(low_rank, f"{path}/wq_b/kernel")
    key = leaves.contract(x, f"{path}/wk/kernel")
    key = layer_norm(key, leaves.read(f"{path}/k_norm/scale"), leaves.read(f"{path}/k_norm/bias"), INDEXER_EPS)
    head_weights = leaves.contract(x, f"{path}/weights_proj/kernel") * indexer.heads**-0.5
    query = rotate(query, prompts.tables(rope), pairs=False)
    key = rotate(key[:, None, :], prompts.tables(rope), pairs=False)[:, 0]
    visible, count = prompts.visible(), min(indexer.top_k, len(x))
    chosen = []
    for rows in _row_blocks(len(x), indexer.heads * len(x) * 4, prompts.score_bytes):
        scores = _index_scores(query[rows], key, head_weights[rows], visible[rows], indexer.head_dim**-0.5)
        theirs = None if original is None else jnp.asarray(original[rows].astype(np.int32))
        # one block at a time: jax would start all of them and hold all scores
        chosen.append(jax.block_until_ready(_choose(scores, visible[rows], count, theirs, tie)))
    return jnp.concatenate(chosen)


@partial(jax.jit, static_argnames="scale")
def _index_scores(
    query: jax.Array, key: jax.Array, head_weights: jax.Array, visible: jax.Array, scale: float
) -> jax.Array:
    """Scores, float32 (rows, tokens): the sum over heads of weight * relu(query · key * scale), -inf where masked.

    query: (rows, heads, dim); key: (tokens, dim); head_weights: (rows, heads); visible: bool (rows, tokens).
    """
    scores = jax.nn.relu(jnp.einsum("nhd,td->nht", query, key) * scale)
    return jnp.where(visible, jnp.einsum("nh,nht->nt", head_weights, scores), -jnp.inf)


@partial(jax.jit, static_argnames=("count", "tie"))
def _choose(scores: jax.Array, visible: jax.Array, count: int, theirs: jax.Array | None, tie: float) -> jax.Array:
    """The `count` best of each row, bool (rows, tokens), or `theirs`, indices (rows, count), where as good."""
    chosen = _at(jax.lax.top_k(scores, count)[1], visible)
    if theirs is None:
        return chosen
    taken = _at(theirs, visible)
    worst = jnp.min(jnp.where(taken, scores, jnp.inf), axis=1, keepdims=True)
    left = jnp.max(jnp.where(visible & ~taken, scores, -jnp.inf), axis=1, keepdims=True)
    scale = jnp.max(jnp.where(visible, jnp.abs(scores), 0), axis=1, keepdims=True)
    as_many = taken.sum(1, keepdims=True) == chosen.sum(1, keepdims=True)
    return jnp.where(as_many & (worst >= left - tie * scale), taken, chosen)


def _at(places: jax.Array, visible: jax.Array) -> jax.Array:
    """Token indices (rows, count) as a mask, bool (rows, tokens), without tokens that are not visible."""
    return jnp.zeros(visible.shape, bool).at[jnp.arange(len(visible))[:, None], places].set(True) & visible


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
    score_bytes: int,
) -> jax.Array:
    """Softmax attention, float32 (tokens, heads, e). Head h reads kv head h // (heads / kv heads).

    query: float32 (tokens, heads, d); key: (tokens, kv heads, d); value: (tokens, kv heads, e). sinks: (heads,), one
    more score for each head: it takes part in the softmax and adds no value.
    """
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(tokens, kv_heads, heads // kv_heads, dim)
    if sinks is not None:
        sinks = sinks.reshape(kv_heads, heads // kv_heads)
    blocks = [  # one block at a time, as in chosen_tokens
        jax.block_until_ready(_attend_rows(grouped[rows], key, value, visible[rows], sinks, scale, softcap))
        for rows in _row_blocks(tokens, heads * tokens * 4, score_bytes)
    ]
    return jnp.concatenate(blocks).reshape(tokens, heads, value.shape[-1])


@partial(jax.jit, static_argnames=("scale", "softcap"))
def _attend_rows(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    sinks: jax.Array | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    scores = jnp.einsum("nkgd,tkd->kgnt", query, key) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[:, :, None, None], (*scores.shape[:3], 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    else:
        shares = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("kgnt,tke->nkge", shares, value)


def _row_blocks(tokens: int, bytes_a_row: int, most: int) -> Iterator[slice]:
    rows = max(1, most // bytes_a_row)
    for start in range(0, tokens, rows):
        yield slice(start, min(start + rows, tokens))
