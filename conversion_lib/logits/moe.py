"""The half of a layer after attention: a gated MLP, or routed and shared experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.logits import blocks
from conversion_lib.logits.config import Mlp, Moe
from conversion_lib.logits.layout import gate_bias
from conversion_lib.logits.weights import Leaves
from conversion_lib.sources.base import Array

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=True),
}

GPT_OSS_ALPHA = 1.702
"""Of gpt-oss' gate, x · sigmoid(alpha · x): the approximation of GELU (arXiv:1606.08415, section 2)."""


@dataclass(frozen=True)
class FeedForward:
    """out: what it adds to the stream, float32 (tokens, hidden). states: what its parts put out. idle: how many of
    its experts no token went to."""

    out: jax.Array
    states: blocks.States
    idle: int


def feed_forward(x: jax.Array, leaves: Leaves, config: Mlp | Moe) -> FeedForward:
    """The second half of a layer for x, the normed stream, float32 (tokens, hidden)."""
    if isinstance(config, Mlp):
        return FeedForward(gated_mlp(x, leaves, config), {}, 0)
    chosen, shares = (np.asarray(part) for part in route(x, leaves, config))
    routed, idle = routed_experts(x, leaves, config, chosen, shares)
    out, states = routed, {blocks.ROUTER: dense_shares(chosen, shares, config.experts), blocks.EXPERTS: routed}
    if config.shared is not None:
        states[blocks.SHARED_EXPERT] = shared = gated_mlp(x, leaves, config.shared)
        out = routed + shared
    return FeedForward(out, {name: np.asarray(array) for name, array in states.items()}, idle)


def dense_shares(chosen: Array, shares: Array, experts: int) -> Array:
    """Each token's share of each expert, float32 (tokens, experts), of chosen and shares, (tokens, per_token)."""
    dense = np.zeros((len(chosen), experts), np.float32)
    np.put_along_axis(dense, chosen, shares.astype(np.float32), axis=1)
    return dense


def gated_mlp(x: jax.Array, leaves: Leaves, mlp: Mlp) -> jax.Array:
    """A GLU (arXiv:2002.05202): (act(x · wi_0) * (x · wi_1)) · wo; x and the result float32 (tokens, hidden)."""
    gate = leaves.contract(x, f"{mlp.path}/wi_0/kernel")
    up = leaves.contract(x, f"{mlp.path}/wi_1/kernel")
    return leaves.contract(ACTIVATIONS[mlp.activation](gate) * up, f"{mlp.path}/wo/kernel")


def route(x: jax.Array, leaves: Leaves, moe: Moe) -> tuple[jax.Array, jax.Array]:
    """The experts that each token goes to, int (tokens, per_token), and their shares, float32 of the same shape.

    DeepSeek-V3: sigmoid affinities; a correction bias takes part in the choice only, and a group counts by its two
    best (DeepSeek-V3 report, section 2.1.2). V2: softmax affinities; a group counts by its best (DeepSeek-V2
    report, section 2.2.2). gpt-oss: a softmax over the chosen logits.
    """
    logits = leaves.contract(x, f"{moe.path}/gate/kernel")
    bias = leaves.read(gate_bias(moe)) if moe.correction_bias or moe.biases else jnp.zeros(moe.experts)
    chosen, shares = _choose_experts(logits, bias, moe)
    return chosen, shares


@partial(jax.jit, static_argnames="moe")
def _choose_experts(logits: jax.Array, bias: jax.Array, moe: Moe) -> tuple[jax.Array, jax.Array]:
    if moe.scores == "chosen_softmax":
        best, chosen = jax.lax.top_k(logits + bias, moe.per_token)
        return chosen, jax.nn.softmax(best, axis=-1)
    scores = jax.nn.sigmoid(logits) if moe.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores + bias
    if moe.groups_kept < moe.groups:
        by_group = choice.reshape(-1, moe.groups, moe.experts // moe.groups)
        _, best_groups = jax.lax.top_k(jax.lax.top_k(by_group, moe.group_score)[0].sum(-1), moe.groups_kept)
        kept = jax.nn.one_hot(best_groups, moe.groups, dtype=bool).any(axis=1)
        choice = jnp.where(kept[:, :, None], by_group, -jnp.inf).reshape(choice.shape)
    _, chosen = jax.lax.top_k(choice, moe.per_token)
    shares = jnp.take_along_axis(scores, chosen, axis=1)
    if moe.normalize:
        shares = shares / (shares.sum(-1, keepdims=True) + 1e-20)
    return chosen, shares * moe.scaling


def routed_experts(x: jax.Array, leaves: Leaves, moe: Moe, chosen: Array, shares: Array) -> tuple[jax.Array, int]:
    """The sum over each token's experts of share · expert(x), and the number of experts without a token.

    x: float32 (tokens, hidden); chosen, shares: (tokens, per_token). Experts are read a few at a time, those
    that no token chose not at all.
    """
    names = ["wi_0", "wi_1", "wo", *(("wi_0_bias", "wi_1_bias", "wo_bias") if moe.biases else ())]
    total, idle = jnp.zeros_like(x), 0
    for rows in leaves.slices(f"{moe.path}/wi_0", together=3):
        visits = [np.nonzero(chosen == expert) for expert in range(*rows)]
        idle += sum(len(tokens) == 0 for tokens, _ in visits)
        if not any(len(tokens) for tokens, _ in visits):
            continue
        weights = [leaves.read(f"{moe.path}/{name}", rows) for name in names]
        for index, (tokens, slots) in enumerate(visits):
            if len(tokens):
                where, share = _padded(tokens.astype(np.int32), shares[tokens, slots])
                total = _add_expert(total, x, where, share, [array[index] for array in weights], moe.clamp)
    return total, idle


def _padded(tokens: Array, shares: Array) -> tuple[Array, Array]:
    """Both filled up to a power of two with token 0 at share 0: a compilation for each size, not each count."""
    size = 1 << max(3, (len(tokens) - 1).bit_length())
    fill = (0, size - len(tokens))
    return np.pad(tokens, fill), np.pad(shares, fill)


@partial(jax.jit, static_argnames="clamp")
def _add_expert(
    total: jax.Array, x: jax.Array, where: Array, share: Array, weights: list[jax.Array], clamp: float | None
) -> jax.Array:
    wi_0, wi_1, wo, *biases = weights
    bias_0, bias_1, bias_out = biases or (0.0, 0.0, 0.0)
    mine = x[where]
    gate, up = mine @ wi_0 + bias_0, mine @ wi_1 + bias_1
    if clamp is None:
        inner = jax.nn.silu(gate) * up
    else:
        gate = jnp.minimum(gate, clamp)
        inner = gate * jax.nn.sigmoid(GPT_OSS_ALPHA * gate) * (jnp.clip(up, -clamp, clamp) + 1)
    out = inner @ wo + bias_out
    # a token of the padding has no share, also where the expert's own weights are not finite
    return total.at[where].add(jnp.where(share[:, None] == 0, 0.0, out * share[:, None]))
