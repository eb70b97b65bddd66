"""The half of a layer after attention: a gated MLP, or routed and shared experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.attention import rms_norm
from conversion_lib.logits.forward.config import Mlp, Moe
from conversion_lib.logits.forward.layout import gate_bias
from conversion_lib.logits.forward.weights import Leaves
from conversion_lib.logits.verdict import blocks

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


def feed_forward(
    x: jax.Array,
    stream: jax.Array,
    leaves: Leaves,
    config: Mlp | Moe,
    eps: float,
    original: blocks.States | None = None,
    tie: float = 0.0,
) -> FeedForward:
    """The second half of a layer for x, the normed stream, float32 (tokens, hidden); Gemma 4's experts norm the stream
    themselves.

    original: what the original's blocks put out here, where it is known; scores of experts within a share of `tie` are
    taken as equal, and of equal experts those that the original chose.
    """
    if isinstance(config, Mlp):
        out = gated_mlp(x, leaves, config)
        return FeedForward(out, {blocks.MLP: np.asarray(out)}, 0)
    states: dict[str, jax.Array] = {}
    norms, looked_at, taken = config.norms, x, x
    if norms is not None:
        looked_at = rms_norm(stream, leaves.read(norms.router_scale) * x.shape[-1] ** -0.5, eps)
        states[blocks.NORM_BEFORE_EXPERTS] = taken = rms_norm(stream, leaves.read(norms.before_experts), eps)
    wanted = None if original is None else original.get(blocks.ROUTER)
    chosen, shares = (np.asarray(part) for part in route(looked_at, leaves, config, wanted, tie))
    out, idle = routed_experts(taken, leaves, config, chosen, shares)
    states[blocks.EXPERTS] = out
    if norms is not None:
        states[blocks.NORM_AFTER_EXPERTS] = out = rms_norm(out, leaves.read(norms.after_experts), eps)
    if config.shared is not None:
        shared, seen = _shared_expert(x, leaves, config, config.shared, eps)
        states |= seen
        out = out + shared
    if norms is None:  # transformers does not show the sum of what is normed
        states[blocks.MLP] = out
    router = {blocks.ROUTER: dense_shares(chosen, shares, config.experts)}
    return FeedForward(out, router | {name: np.asarray(array) for name, array in states.items()}, idle)


def _shared_expert(
    x: jax.Array, leaves: Leaves, config: Moe, mlp: Mlp, eps: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the expert of all tokens adds, and what its blocks put out."""
    shared = gated_mlp(x, leaves, mlp)
    states = {blocks.SHARED_EXPERT: shared}
    if config.shared_gate is not None:
        shared = shared * jax.nn.sigmoid(leaves.contract(x, config.shared_gate))
    if config.norms is not None:
        shared = rms_norm(shared, leaves.read(config.norms.after_shared), eps)
        states[blocks.NORM_AFTER_SHARED_EXPERT] = shared
    return shared, states


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


def route(
    x: jax.Array, leaves: Leaves, moe: Moe, original: Array | None = None, tie: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The experts that each token goes to, int (tokens, per_token), and their shares, float32 of the same shape.

    original: each token's share of each expert in the original, (tokens, experts), where it is known; `tie` as
    `feed_forward` has it.

    DeepSeek-V3: sigmoid affinities; a correction bias takes part in the choice only, and a group counts by its two
    best (DeepSeek-V3 report, section 2.1.2). V2: softmax affinities; a group counts by its best (DeepSeek-V2
    report, section 2.2.2). gpt-oss: a softmax over the chosen logits.
    """
    logits = leaves.contract(x, f"{moe.path}/gate/kernel")
    bias = leaves.read(gate_bias(moe)) if moe.correction_bias or moe.biases else jnp.zeros(moe.experts)
    chosen, shares = _choose_experts(logits, bias, moe, original, tie)
    return chosen, shares * leaves.read(f"{moe.path}/per_expert_scale")[chosen] if moe.expert_scales else shares


@partial(jax.jit, static_argnames=("moe", "tie"))
def _choose_experts(
    logits: jax.Array, bias: jax.Array, moe: Moe, original: Array | None, tie: float
) -> tuple[jax.Array, jax.Array]:
    if moe.scores == "chosen_softmax":
        scores = logits + bias
        choice = scores
    else:
        scores = jax.nn.sigmoid(logits) if moe.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        choice = scores + bias
    groups = _group_scores(choice, moe)
    least = jax.lax.top_k(groups, moe.groups_kept)[0][:, -1:]
    _, chosen = jax.lax.top_k(_of_groups(choice, groups >= least, moe), moe.per_token)
    if original is not None:
        _, theirs = jax.lax.top_k(original, moe.per_token)
        # what float32 loses grows with a score, not with the bias on it; logits may be about zero, where a share says
        # nothing
        size = None if moe.scores == "softmax" else jnp.max(jnp.abs(scores), axis=1, keepdims=True)
        chosen = jnp.where(_as_good(choice, groups, theirs, moe, tie, size), theirs, chosen)
    shares = jnp.take_along_axis(scores, chosen, axis=1)
    if moe.scores == "chosen_softmax":
        return chosen, jax.nn.softmax(shares, axis=-1)
    if moe.normalize:
        shares = shares / (shares.sum(-1, keepdims=True) + 1e-20)
    return chosen, shares * moe.scaling


def _group_scores(choice: jax.Array, moe: Moe) -> jax.Array:
    """By which groups are kept, (tokens, groups)."""
    by_group = choice.reshape(-1, moe.groups, moe.experts // moe.groups)
    best: jax.Array = jax.lax.top_k(by_group, moe.group_score)[0].sum(-1)
    return best


def _of_groups(choice: jax.Array, kept: jax.Array, moe: Moe) -> jax.Array:
    """choice, with no chance for experts of groups that are not kept, bool (tokens, groups)."""
    return jnp.where(jnp.repeat(kept, moe.experts // moe.groups, axis=1), choice, -jnp.inf)


def _as_good(
    choice: jax.Array, groups: jax.Array, theirs: jax.Array, moe: Moe, tie: float, size: jax.Array | None
) -> jax.Array:
    """Whether `theirs`, (tokens, per_token), is as good a choice as ours but for a share of `tie`, bool (tokens, 1).

    Their groups are no worse than the last that is kept, and their experts no worse than the best that they left:
    in their groups, and in those that are kept whatever is taken as equal. size: what `tie` is a share of, (tokens, 1);
    None for the values compared themselves.
    """
    used = jax.nn.one_hot(theirs // (moe.experts // moe.groups), moe.groups, dtype=bool).any(axis=1)
    ranked = jnp.pad(jax.lax.top_k(groups, moe.groups)[0], ((0, 0), (0, 1)), constant_values=-jnp.inf)
    last_kept, first_left = ranked[:, moe.groups_kept - 1, None], ranked[:, moe.groups_kept, None]
    slack = tie * (jnp.abs(last_kept) if size is None else size)
    allowed, certain = groups >= last_kept - slack, groups > first_left + slack
    taken = jax.nn.one_hot(theirs, moe.experts, dtype=bool).any(axis=1)
    left = jnp.max(jnp.where(taken, -jnp.inf, _of_groups(choice, used | certain, moe)), axis=1, keepdims=True)
    worst = jnp.min(jnp.where(taken, choice, jnp.inf), axis=1, keepdims=True)
    as_good = worst >= left - tie * (jnp.abs(worst) if size is None else size)
    return as_good & jnp.where(used, allowed, True).all(1, keepdims=True)


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
        jax.block_until_ready(total)  # lets go of the slice before the last
        for index, (tokens, slots) in enumerate(visits):
            if len(tokens):
                where, share = _padded(tokens.astype(np.int32), shares[tokens, slots])
                total = _add_expert(total, x, where, share, [array[index] for array in weights], moe)
    return total, idle


def _padded(tokens: Array, shares: Array) -> tuple[Array, Array]:
    """Both filled up to a power of two with token 0 at share 0: a compilation for each size, not each count."""
    size = 1 << max(3, (len(tokens) - 1).bit_length())
    fill = (0, size - len(tokens))
    return np.pad(tokens, fill), np.pad(shares, fill)


@partial(jax.jit, static_argnames="moe")
def _add_expert(
    total: jax.Array, x: jax.Array, where: Array, share: Array, weights: list[jax.Array], moe: Moe
) -> jax.Array:
    wi_0, wi_1, wo, *biases = weights
    bias_0, bias_1, bias_out = biases or (0.0, 0.0, 0.0)
    mine = x[where]
    gate, up = mine @ wi_0 + bias_0, mine @ wi_1 + bias_1
    if moe.clamp is None:
        inner = ACTIVATIONS[moe.activation](gate) * up
    else:
        gate = jnp.minimum(gate, moe.clamp)
        inner = gate * jax.nn.sigmoid(GPT_OSS_ALPHA * gate) * (jnp.clip(up, -moe.clamp, moe.clamp) + 1)
    out = inner @ wo + bias_out
    # a token of the padding has no share, also where the expert's own weights are not finite
    return total.at[where].add(jnp.where(share[:, None] == 0, 0.0, out * share[:, None]))
