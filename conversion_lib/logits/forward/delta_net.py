"""The gated delta net of Qwen 3 Next and 3.5 (arXiv:2412.06464), computed token by token as a recurrence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.logits.forward.attention import Prompts, rms_norm
from conversion_lib.logits.forward.config import DeltaNet
from conversion_lib.logits.forward.weights import Leaves

UNIT_EPS = 1e-6
"""Epsilon of the L2 norm of query and key, as in flash-linear-attention."""


def delta_net(x: jax.Array, leaves: Leaves, path: str, net: DeltaNet, eps: float, prompts: Prompts) -> jax.Array:
    """Computes a gated delta net, as transformers' `Qwen3NextGatedDeltaNet`.

    For each key head, `in_proj_qkvz` holds side by side the query, the key, the values of its value heads and their
    gates; `in_proj_ba` holds beta and alpha of these heads.

    Args:
        x: The normed residual stream, float32 (tokens, hidden).
        leaves: The layer's weights.
        path: Path of the net below the layer.
        net: Its sizes.
        eps: Epsilon of the norm on the output.
        prompts: Where prompts begin: the state and the convolution start anew there.

    Returns:
        float32 (tokens, hidden), before it is added to the stream.
    """
    tokens, each = len(x), net.value_heads // net.key_heads
    values = each * net.value_dim
    mixed = leaves.contract(x, f"{path}/in_proj_qkvz/kernel").reshape(tokens, net.key_heads, -1)
    query, key, value, gate = jnp.split(mixed, np.cumsum([net.key_dim, net.key_dim, values]), axis=-1)
    beta, alpha = jnp.split(leaves.contract(x, f"{path}/in_proj_ba/kernel").reshape(tokens, net.key_heads, -1), 2, -1)

    channels = jnp.concatenate([part.reshape(tokens, -1) for part in (query, key, value)], axis=-1)
    convolved = _convolve(channels, leaves.read(f"{path}/conv1d/kernel")[:, 0], jnp.asarray(prompts.positions))
    keys = net.key_heads * net.key_dim
    query, key, value = jnp.split(convolved, [keys, 2 * keys], axis=-1)
    query, key = (_unit(part.reshape(tokens, net.key_heads, -1)) for part in (query, key))

    step = jax.nn.softplus(alpha.reshape(tokens, -1) + leaves.read(f"{path}/dt_bias"))
    out = _recur(
        jnp.repeat(query * net.key_dim**-0.5, each, axis=1),
        jnp.repeat(key, each, axis=1),
        value.reshape(tokens, net.value_heads, net.value_dim),
        jnp.exp(-jnp.exp(leaves.read(f"{path}/A_log")) * step),
        jax.nn.sigmoid(beta).reshape(tokens, -1),
        jnp.asarray(prompts.positions == 0),
    )
    normed = rms_norm(out, leaves.read(f"{path}/norm/rms_norm/scale"), eps)
    gated = normed * jax.nn.silu(gate.reshape(out.shape))
    return leaves.contract(gated.reshape(tokens, -1), f"{path}/out_proj/kernel")


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + UNIT_EPS)


@jax.jit
def _convolve(x: jax.Array, kernel: jax.Array, positions: jax.Array) -> jax.Array:
    """Convolves each channel of x, (tokens, channels), causally within a prompt, then applies SiLU.

    kernel: (taps, channels); the last tap is for the token itself.
    """
    total = jnp.zeros_like(x)
    for back in range(len(kernel)):
        earlier = jnp.roll(x, back, axis=0)
        total = total + jnp.where(positions[:, None] >= back, earlier, 0) * kernel[-1 - back]
    return jax.nn.silu(total)


@jax.jit
def _recur(
    query: jax.Array, key: jax.Array, value: jax.Array, decay: jax.Array, beta: jax.Array, first: jax.Array
) -> jax.Array:
    """The gated delta rule (arXiv:2412.06464, equation 10), float32 (tokens, heads, value_dim).

    At each token the state decays, the value stored under the key moves towards the new value by beta, and the query
    reads the state. query, key: (tokens, heads, key_dim); value: (tokens, heads, value_dim); decay, beta: (tokens,
    heads); first: bool (tokens,), True where a prompt begins with an empty state.
    """

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, key, value, decay, beta, first = token
        state = jnp.where(first, 0, state * decay[:, None, None])
        known = jnp.einsum("hkv,hk->hv", state, key)
        state = state + key[:, :, None] * (beta[:, None] * (value - known))[:, None, :]
        return state, jnp.einsum("hkv,hk->hv", state, query)

    empty = jnp.zeros((*key.shape[1:], value.shape[-1]))
    out: jax.Array = jax.lax.scan(step, empty, (query, key, value, decay, beta, first))[1]
    return out
