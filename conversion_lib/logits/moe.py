"""The half of a layer after attention: a gated MLP, or routed and shared experts."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.logits.config import ForwardConfig, MoeConfig
from conversion_lib.logits.layout import GATE_BIAS, ROUTED, SHARED
from conversion_lib.logits.weights import SLICE_BYTES, Leaves
from conversion_lib.sources.base import Array


def feed_forward(x: jax.Array, leaves: Leaves, config: ForwardConfig, layer: int) -> tuple[jax.Array, int]:
    """What the second half of a layer adds to the stream, and how many of its experts no token went to.

    x is the normed stream, float32 (tokens, hidden), as is the result.
    """
    if config.moe is None or layer < config.moe.dense_layers:
        return gated_mlp(x, leaves, "mlp"), 0
    chosen, gates = route(x, leaves, config.moe)
    routed, idle = routed_experts(x, leaves, config.moe, np.asarray(chosen), np.asarray(gates))
    return routed + gated_mlp(x, leaves, SHARED), idle


def gated_mlp(x: jax.Array, leaves: Leaves, prefix: str) -> jax.Array:
    """SwiGLU (arXiv:2002.05202): (silu(x · wi_0) * (x · wi_1)) · wo; x and the result float32 (tokens, hidden)."""
    gate = leaves.contract(x, f"{prefix}/wi_0/kernel")
    up = leaves.contract(x, f"{prefix}/wi_1/kernel")
    return leaves.contract(jax.nn.silu(gate) * up, f"{prefix}/wo/kernel")


def route(x: jax.Array, leaves: Leaves, moe: MoeConfig) -> tuple[jax.Array, jax.Array]:
    """The experts that each token goes to, int (tokens, per_token), and their shares, float32 of the same shape.

    V3: sigmoid affinities; a correction bias takes part in the choice only, and a group counts by its two best
    (DeepSeek-V3 report, section 2.1.2). V2: softmax affinities; a group counts by its best (DeepSeek-V2 report,
    section 2.2.2).
    """
    affinity = leaves.contract(x, f"{ROUTED}/gate/kernel")
    if moe.sigmoid:
        chosen, gates = _choose_experts(jax.nn.sigmoid(affinity), leaves.read(GATE_BIAS), moe)
    else:
        chosen, gates = _choose_experts(jax.nn.softmax(affinity, axis=-1), jnp.zeros(moe.experts), moe)
    return chosen, gates


@partial(jax.jit, static_argnames="moe")
def _choose_experts(scores: jax.Array, bias: jax.Array, moe: MoeConfig) -> tuple[jax.Array, jax.Array]:
    choice = scores + bias
    if moe.grouped:
        by_group = choice.reshape(-1, moe.groups, moe.experts // moe.groups)
        group_scores = jax.lax.top_k(by_group, 2 if moe.sigmoid else 1)[0].sum(-1)
        _, best = jax.lax.top_k(group_scores, moe.groups_kept)
        kept = jax.nn.one_hot(best, moe.groups, dtype=bool).any(axis=1)
        choice = jnp.where(kept[:, :, None], by_group, -jnp.inf).reshape(choice.shape)
    _, chosen = jax.lax.top_k(choice, moe.per_token)
    gates = jnp.take_along_axis(scores, chosen, axis=1)
    if moe.normalize:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return chosen, gates * moe.scaling


def routed_experts(x: jax.Array, leaves: Leaves, moe: MoeConfig, chosen: Array, gates: Array) -> tuple[jax.Array, int]:
    """The sum over each token's experts of gate · expert(x), and the number of experts without a token.

    x: float32 (tokens, hidden); chosen, gates: (tokens, per_token). Experts are read a few at a time, those
    that no token chose not at all.
    """
    total, idle = jnp.zeros_like(x), 0
    expert_bytes = 3 * 4 * x.shape[1] * moe.width
    step = max(1, SLICE_BYTES // expert_bytes)
    for start in range(0, moe.experts, step):
        rows = (start, min(start + step, moe.experts))
        visits = [np.nonzero(chosen == expert) for expert in range(*rows)]
        idle += sum(len(tokens) == 0 for tokens, _ in visits)
        if not any(len(tokens) for tokens, _ in visits):
            continue
        wi_0, wi_1, wo = (leaves.read(f"{ROUTED}/{name}", rows) for name in ("wi_0", "wi_1", "wo"))
        for index, (tokens, slots) in enumerate(visits):
            if len(tokens):
                where, share = _padded(tokens.astype(np.int32), gates[tokens, slots])
                total = _add_expert(total, x, where, share, wi_0[index], wi_1[index], wo[index])
    return total, idle


def _padded(tokens: Array, shares: Array) -> tuple[Array, Array]:
    """Both filled up to a power of two with token 0 at share 0: a compilation for each size, not each count."""
    size = 1 << max(3, (len(tokens) - 1).bit_length())
    fill = (0, size - len(tokens))
    return np.pad(tokens, fill), np.pad(shares, fill)


@jax.jit
def _add_expert(
    total: jax.Array, x: jax.Array, where: Array, share: Array, wi_0: jax.Array, wi_1: jax.Array, wo: jax.Array
) -> jax.Array:
    mine = x[where]
    out = (jax.nn.silu(mine @ wi_0) * (mine @ wi_1)) @ wo
    return total.at[where].add(out * share[:, None])
