"""The RoPE that a config.json asks for, in either of transformers' spellings, with every default written out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from conversion_lib.maxtext.table import EVERY_LAYER, FULL, SLIDING, yarn_temperature
from conversion_lib.models.hf_config import ModelConfig, Values

TEXT_SECTIONS = (11, 11, 10)
"""Of Qwen 3.5's RoPE, where none are said: with text alone they change nothing, but MaxText wants them to add up."""

Rope = dict[str, Any]


def ropes_of(config: ModelConfig, layers: Iterable[str]) -> dict[str, Rope]:
    """The parameters of RoPE by the kind of layer, "" where all have the same.

    Each has `rope_type`, `rope_theta` and `rope_interleave`, and whatever its type needs.

    Args:
        config: A config.json with the defaults of its class.
        layers: The kinds of layer that MaxText's model tells apart.

    Raises:
        BadInput: A value is of another type than it must be.
    """
    return {kind: _rope(config, kind) for kind in layers}


def _given(config: ModelConfig, key: str) -> Values | None:
    values = config.section(key)
    return None if values is None or values.empty else values


def _rope(config: ModelConfig, kind: str) -> Rope:
    scaling, nested = _given(config, "rope_scaling"), _given(config, "rope_parameters")
    theta = config.optional_number("rope_theta", above=1)
    if kind == EVERY_LAYER:
        return _written_out(config, scaling or nested or Values({}, config.path), theta)
    own = nested.section(kind) if nested else None
    values = own or Values({}, config.path)
    if kind == SLIDING:
        theta = config.optional_number("rope_local_base_freq", above=1) or theta
    if kind == FULL and scaling is not None:  # older files scale the full layers alone
        values = scaling.over(values)
    return _written_out(config, values, theta)


def _written_out(config: ModelConfig, values: Values, theta: float | None) -> Rope:
    kind = values.text("rope_type", default=values.text("type", default="default"))
    rope: Rope = {
        "rope_type": kind,
        "rope_theta": values.number("rope_theta", default=theta, above=1),
        "rope_interleave": config.flag("rope_interleave", default=True),
    }
    share = values.optional_number("partial_rotary_factor") or config.optional_number("partial_rotary_factor")
    if share is not None:
        rope["partial_rotary_factor"] = share
    if kind == "default":
        return rope | {"mrope_section": list(values.integers("mrope_section")) or list(TEXT_SECTIONS)}
    positions = config.count("max_position_embeddings")
    trained = config.optional_count("original_max_position_embeddings")
    original = trained or values.count("original_max_position_embeddings", default=positions)
    factor = values.number("factor", default=1.0 if kind == "proportional" else positions / original, above=0)
    rope |= {"original_max_position_embeddings": original, "factor": factor}
    if kind == "llama3":
        rope |= {key: values.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    return rope | _yarn(values, factor) if kind == "yarn" else rope


def _yarn(values: Values, factor: float) -> Rope:
    """What YaRN takes by default (transformers' `modeling_rope_utils`)."""
    mscale, every = (values.optional_number(key, least=0) for key in ("mscale", "mscale_all_dim"))
    given = values.optional_number("attention_factor", least=0)
    if given is None and mscale and every:
        given = yarn_temperature(factor, mscale) / yarn_temperature(factor, every)
    return {
        "beta_fast": values.optional_number("beta_fast", least=0) or 32.0,
        "beta_slow": values.optional_number("beta_slow", least=0) or 1.0,
        "truncate": values.flag("truncate", default=True),
        "attention_factor": yarn_temperature(factor, 1.0) if given is None else given,
        "mscale_all_dim": every or 0.0,
    }
