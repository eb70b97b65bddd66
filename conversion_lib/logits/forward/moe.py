"""The second half of a layer, after attention: a gated MLP, or routed and shared experts."""

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
"""Alpha of gpt-oss' gate, x · sigmoid(alpha · x): the sigmoid approximation of GELU (arXiv:1606.08415, section 2)."""


@dataclass(frozen=True)
class FeedForward:
    """The output of the second half of a layer.

    Attributes:
        out: What is added to the residual stream, float32 (tokens, hidden), before the norm after the MLP.
        states: Outputs of its blocks.
        idle: Experts that received no token.
    """

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
    """Computes the second half of a layer.

    Args:
        x: The normed residual stream, float32 (tokens, hidden).
        stream: The same before the norm. Gemma 4's router and experts apply norms of their own to it
            (transformers' `Gemma4TextDecoderLayer`).
        leaves: The layer's weights.
        config: A gated MLP, or experts.
        eps: Epsilon of these norms.
        original: Outputs of the original's blocks in this layer, where known. Among experts with equal scores, the
            original's choice is used.
        tie: Scores are equal if they differ by at most this share, as in `route`.
    """
    if isinstance(config, Mlp):
        out = gated_mlp(x, leaves, config)
        return FeedForward(out, {blocks.MLP: np.asarray(out)}, 0)
    states: dict[str, jax.Array] = {}
    norms, router_input, expert_input = config.norms, x, x
    if norms is not None:
        router_input = rms_norm(stream, leaves.read(norms.router_scale) * x.shape[-1] ** -0.5, eps)
        states[blocks.NORM_BEFORE_EXPERTS] = expert_input = rms_norm(stream, leaves.read(norms.before_experts), eps)
    theirs = None if original is None else original.get(blocks.ROUTER)
    chosen, shares = (np.asarray(part) for part in route(router_input, leaves, config, theirs, tie))
    out, idle = routed_experts(expert_input, leaves, config, chosen, shares)
    states[blocks.EXPERTS] = out
    if norms is not None:
        states[blocks.NORM_AFTER_EXPERTS] = out = rms_norm(out, leaves.read(norms.after_experts), eps)
    if config.shared is not None:
        shared, seen = _shared_expert(x, leaves, config, config.shared, eps)
        states |= seen
        out = out + shared
    if norms is None:  # with norms, transformers has no module whose output is this sum
        states[blocks.MLP] = out
    router = {blocks.ROUTER: dense_shares(chosen, shares, config.experts)}
    return FeedForward(out, router | {name: np.asarray(array) for name, array in states.items()}, idle)


def _shared_expert(
    x: jax.Array, leaves: Leaves, config: Moe, mlp: Mlp, eps: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The output of the shared expert, float32 (tokens, hidden), and the outputs of its blocks."""
    shared = gated_mlp(x, leaves, mlp)
    states = {blocks.SHARED_EXPERT: shared}
    if config.shared_gate is not None:
        shared = shared * jax.nn.sigmoid(leaves.contract(x, config.shared_gate))
    if config.norms is not None:
        shared = rms_norm(shared, leaves.read(config.norms.after_shared), eps)
        states[blocks.NORM_AFTER_SHARED_EXPERT] = shared
    return shared, states


def dense_shares(chosen: Array, shares: Array, experts: int) -> Array:
    """Scatters the shares of the chosen experts, both (tokens, per_token), into float32 (tokens, experts)."""
    dense = np.zeros((len(chosen), experts), np.float32)
    np.put_along_axis(dense, chosen, shares.astype(np.float32), axis=1)
    return dense


def gated_mlp(x: jax.Array, leaves: Leaves, mlp: Mlp) -> jax.Array:
    """Computes a GLU (arXiv:2002.05202), (act(x · wi_0) * (x · wi_1)) · wo, from and to float32 (tokens, hidden)."""
    gate = leaves.contract(x, f"{mlp.path}/wi_0/kernel")
    up = leaves.contract(x, f"{mlp.path}/wi_1/kernel")
    return leaves.contract(ACTIVATIONS[mlp.activation](gate) * up, f"{mlp.path}/wo/kernel")


def route(
    x: jax.Array, leaves: Leaves, moe: Moe, original: Array | None = None, tie: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Chooses the experts of each token and their shares.

    DeepSeek-V3: sigmoid scores; the correction bias affects only the choice, and the sum of a group's two best scores
    ranks it (DeepSeek-V3 report, section 2.1.2; `DeepseekV3TopkRouter` of transformers). DeepSeek-V2: softmax scores;
    a group's best score ranks it (DeepSeek-V2 report, section 2.2.2). gpt-oss: a softmax over the logits of the chosen
    experts (`GptOssTopKRouter`).

    Args:
        x: Input of the router, float32 (tokens, hidden).
        leaves: The layer's weights.
        moe: Sizes and switches.
        original: The original's share of each expert, float32 (tokens, experts), where known. Its choice is used for
            each token where it is as good.
        tie: By how much it may be worse, as a share of the token's largest absolute score; with softmax scores, of
            the compared scores themselves.

    Returns:
        The experts, int32 (tokens, per_token), and their shares, float32 (tokens, per_token).
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
        # float32's error grows with the score, not with the bias added to it; of logits the largest counts, since a
        # share of one near zero says nothing
        size = None if moe.scores == "softmax" else jnp.max(jnp.abs(scores), axis=1, keepdims=True)
        chosen = jnp.where(_as_good(choice, groups, theirs, moe, tie, size), theirs, chosen)
    shares = jnp.take_along_axis(scores, chosen, axis=1)
    if moe.scores == "chosen_softmax":
        return chosen, jax.nn.softmax(shares, axis=-1)
    if moe.normalize:
        shares = shares / (shares.sum(-1, keepdims=True) + 1e-20)
    return chosen, shares * moe.scaling


def _group_scores(choice: jax.Array, moe: Moe) -> jax.Array:
    """The scores that rank the groups, (tokens, groups)."""
    by_group = choice.reshape(-1, moe.groups, moe.experts // moe.groups)
    best: jax.Array = jax.lax.top_k(by_group, moe.group_score)[0].sum(-1)
    return best


def _of_groups(choice: jax.Array, kept: jax.Array, moe: Moe) -> jax.Array:
    """The scores `choice`, -inf for experts outside the `kept` groups, bool (tokens, groups)."""
    return jnp.where(jnp.repeat(kept, moe.experts // moe.groups, axis=1), choice, -jnp.inf)


def _as_good(
    choice: jax.Array, groups: jax.Array, theirs: jax.Array, moe: Moe, tie: float, size: jax.Array | None
) -> jax.Array:
    """Whether `theirs`, (tokens, per_token), is as good a choice as ours within `tie`, bool (tokens, 1).

    Their groups must be no worse than the last group that is kept. Their experts must be no worse than the best expert
    that they leave out, in their own groups and in the groups that are kept even if ties are broken against them.
    size: what `tie` is a share of, (tokens, 1); None for the compared values themselves.
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
    """Sums share · expert(x) over the experts of each token.

    Experts are read a few at a time. A slice of experts that received no token is not read.

    Args:
        x: Input of the experts, float32 (tokens, hidden).
        leaves: The layer's weights.
        moe: Sizes and switches.
        chosen: The experts of each token, int (tokens, per_token).
        shares: Their shares, float32 (tokens, per_token).

    Returns:
        float32 (tokens, hidden), and the number of experts without a token.
    """
    names = ["wi_0", "wi_1", "wo", *(("wi_0_bias", "wi_1_bias", "wo_bias") if moe.biases else ())]
    total, idle = jnp.zeros_like(x), 0
    for rows in leaves.slices(f"{moe.path}/wi_0", together=3):
        visits = [np.nonzero(chosen == expert) for expert in range(*rows)]
        idle += sum(len(tokens) == 0 for tokens, _ in visits)
        if not any(len(tokens) for tokens, _ in visits):
            continue
        weights = [leaves.read(f"{moe.path}/{name}", rows) for name in names]
        jax.block_until_ready(total)  # releases the slice before the last
        for index, (tokens, slots) in enumerate(visits):
            if len(tokens):
                where, share = _padded(tokens.astype(np.int32), shares[tokens, slots])
                total = _add_expert(total, x, where, share, [array[index] for array in weights], moe)
    return total, idle


def _padded(tokens: Array, shares: Array) -> tuple[Array, Array]:
    """Pads both to a power of two with token 0 at share 0, so that jax compiles once for a size, not for each count."""
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
    # padding adds nothing, even where the expert's weights are not finite
    return total.at[where].add(jnp.where(share[:, None] == 0, 0.0, out * share[:, None]))
