"""Rotary position embedding (RoFormer, arXiv:2104.09864) with the scalings of Llama 3.1, YaRN and Gemma 4."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> tuple[Array, float]:
    """The angle that each pair of dimensions turns by at each position, float32 (dim / 2,), and the factor
    on cosine and sine. Computed in float32, as transformers does: the angle at position 500 shows the
    difference to float64."""
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
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended
    (`rope_type: llama3` of its config.json)."""
    factor = np.float32(rope.values["factor"])
    low, high = rope.values["low_freq_factor"], rope.values["high_freq_factor"]
    context = rope.values["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    keep = ((context / wavelength - low) / (high - low)).astype(np.float32)
    blended = (1 - keep) * plain / factor + keep * plain
    stretched = np.where(wavelength > context / low, plain / factor, blended)
    return np.where(wavelength < context / high, plain, stretched)


def _yarn(plain: Array, rope: RopeConfig) -> Array:
    """YaRN (arXiv:2309.00071), section 3.2, "NTK-by-parts": dimensions that turn more than `beta_fast` times
    within the original context keep their frequency, those that turn less than `beta_slow` times are
    interpolated by `factor`, those between are blended along a ramp."""
    context = rope.values["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        return rope.dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_of(rope.values.get("beta_fast") or 32)
    high = dimension_of(rope.values.get("beta_slow") or 1)
    if rope.values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # no ramp at all would divide by zero
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    blended: Array = plain / np.float32(rope.values["factor"]) * ramp + plain * (1 - ramp)
    return blended


def yarn_mscale(factor: float, weight: float) -> float:
    """YaRN's temperature, 0.1 · weight · ln(factor) + 1 (section 3.4, with DeepSeek's weight); 1 where
    nothing is stretched."""
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
    """Cosine and sine, float32 (tokens, dim / 2), for integer `positions` (tokens,)."""
    frequencies, factor = inverse_frequencies(rope)
    angles = positions[:, None].astype(np.float32) * frequencies
    return jnp.asarray(np.cos(angles) * np.float32(factor)), jnp.asarray(np.sin(angles) * np.float32(factor))


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array], *, pairs: bool) -> jax.Array:
    """Turns x, float32 (tokens, heads, dim), by the angles of `tables`, and leaves dimensions beyond theirs.

    pairs: dimensions (2i, 2i + 1) turn together; otherwise (i, i + dim / 2). The result is always in halves:
    query and key come out in the same order, which is all that their product needs.
    """
    cos, sin = tables[0][:, None, :], tables[1][:, None, :]
    x, still = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = (x[..., 0::2], x[..., 1::2]) if pairs else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, still], axis=-1)
