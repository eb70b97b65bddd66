"""The families, one in each file. To add one: its file here, a line below, and its models in `catalog.py`."""

from __future__ import annotations

import difflib

from conversion_lib.errors import BadInput
from conversion_lib.families import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    gemma2,
    gemma3,
    gemma4,
    gemma4_small,
    gpt_oss,
    llama3,
    mixtral,
    olmo3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from conversion_lib.mapping.rules import Family
from conversion_lib.models.class_defaults import known_as
from conversion_lib.models.hf_config import ModelConfig

MODULES = (
    llama3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    mixtral,
    gpt_oss,
    gemma2,
    gemma3,
    gemma4,
    gemma4_small,
    olmo3,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in MODULES}

LATER = (
    "DeepseekV4ForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
)
"""Architectures that MaxText knows and Ferry does not; no table here fits them."""


def family_named(name: str, where: object) -> Family:
    """The family of that name, as the record `where` says it. Raises BadInput where there is none."""
    if name not in FAMILIES:
        raise BadInput(f"{where} names the family {name!r}, which this version does not have: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(config: ModelConfig) -> Family:
    """Returns the family of the config's architecture.

    A config without `architectures` is matched by its `model_type`.

    Raises:
        BadInput: There is no such family; the message has the nearest names.
    """
    for name in config.architectures:
        if name in LATER:
            raise BadInput(f"{config.path}: architecture {name} is not supported, not even with --model")
    for family in FAMILIES.values():
        if _names(config, family) and family.fits(config.of_class(family.model_type)):
            return family
    known = list(dict.fromkeys(name for family in FAMILIES.values() for name in family.architectures))
    asked = ", ".join(config.architectures) or f"none (model_type {config.model_type or 'missing'})"
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.3) or known
    raise BadInput(
        f"{config.path}: architecture {asked} is not known; the nearest are {', '.join(near)}. "
        "If it is one of these under another name, choose it with --model"
    )


def _names(config: ModelConfig, family: Family) -> bool:
    """Whether config.json names the family: by a class, by one that training wrapped, or by its `model_type` alone."""
    same_type = known_as(config.model_type) == family.model_type
    if not config.architectures:
        return same_type
    return any(
        name == known or (same_type and name.endswith(known))
        for name in config.architectures
        for known in family.architectures
    )
