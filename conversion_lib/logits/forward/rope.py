"""Rotary position embedding (RoFormer, arXiv:2104.09864) with the scalings of Llama 3.1, YaRN and Gemma 4."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> tuple[Array, float]:
    """Computes the rotation angle per position of each pair of dimensions.

    The formulas are those of transformers' `modeling_rope_utils`. They are computed in float32, as there: at position
    500 the angle already differs from that of float64.

    Args:
        rope: RoPE of one kind of layer. `rope.kind` is one of default, linear, llama3, yarn, proportional.

    Returns:
        The angles in radians, float32 (rope.dim / 2,), and the factor on cosine and sine (1.0 except for YaRN).
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = np.float32(1) / np.power(np.float32(rope.theta), exponents)
    if rope.kind == "linear":
        return plain / np.float32(rope.values["factor"]), 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, rope), _yarn_attention_factor(rope)
    if rope.kind == "proportional":
        turning = int(rope.values.get("partial_rotary_factor", 1.0) * rope.dim // 2)
        return np.where(np.arange(rope.dim // 2) < turning, plain / np.float32(rope.values["factor"]), 0), 1.0
    return plain, 1.0


def _llama3(plain: Array, rope: RopeConfig) -> Array:
    """Llama 3.1: stretches long wavelengths by `factor`, keeps short ones and blends those between.

    As `_compute_llama3_parameters` of transformers.
    """
    factor = np.float32(rope.values["factor"])
    low, high = rope.values["low_freq_factor"], rope.values["high_freq_factor"]
    context = rope.values["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    keep = ((context / wavelength - low) / (high - low)).astype(np.float32)
    blended = (1 - keep) * plain / factor + keep * plain
    stretched = np.where(wavelength > context / low, plain / factor, blended)
    return np.where(wavelength < context / high, plain, stretched)


def _yarn(plain: Array, rope: RopeConfig) -> Array:
    """YaRN (arXiv:2309.00071, section 3.2, "NTK-by-parts").

    Dimensions that turn more than `beta_fast` times within the original context keep their frequency. Those that turn
    less than `beta_slow` times are interpolated by `factor`. Those between are blended along a linear ramp.
    """
    context = rope.values["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        return rope.dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_of(rope.values.get("beta_fast") or 32)
    high = dimension_of(rope.values.get("beta_slow") or 1)
    if rope.values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # a ramp of length 0 would divide by zero
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    blended: Array = plain / np.float32(rope.values["factor"]) * ramp + plain * (1 - ramp)
    return blended


def yarn_mscale(factor: float, weight: float) -> float:
    """Computes YaRN's attention temperature, 0.1 · weight · ln(factor) + 1 (arXiv:2309.00071, section 3.4).

    Args:
        factor: By which the context is extended. At 1 or less the temperature is 1.
        weight: DeepSeek's `mscale` or `mscale_all_dim`; 1 in the paper.
    """
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention_factor(rope: RopeConfig) -> float:
    given = rope.values.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = rope.values.get("mscale"), rope.values.get("mscale_all_dim")
    factor = rope.values["factor"]
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor, 1.0)


def rotation_tables(rope: RopeConfig, positions: Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine, float32 (tokens, rope.dim / 2) each, for integer `positions` (tokens,)."""
    frequencies, factor = inverse_frequencies(rope)
    angles = positions[:, None].astype(np.float32) * frequencies
    return jnp.asarray(np.cos(angles) * np.float32(factor)), jnp.asarray(np.sin(angles) * np.float32(factor))


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array], *, pairs: bool) -> jax.Array:
    """Rotates the first dimensions of each head, as many as `tables` covers, and keeps the others (RoFormer, eq. 34).

    Args:
        x: Queries or keys, float32 (tokens, heads, dim).
        tables: Cosine and sine, float32 (tokens, rotated dim / 2) each.
        pairs: True: dimensions (2i, 2i + 1) form a pair. False: (i, i + rotated dim / 2).

    Returns:
        float32 (tokens, heads, dim), always in halves. Query and key have the same order, which is all that their dot
        product needs.
    """
    cos, sin = tables[0][:, None, :], tables[1][:, None, :]
    x, still = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = (x[..., 0::2], x[..., 1::2]) if pairs else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, still], axis=-1)
