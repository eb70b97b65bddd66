"""One file a family. Adding one: its file here, a line below, and its models in `catalog.py`."""

from __future__ import annotations

import difflib

from conversion_lib.config import ModelConfig
from conversion_lib.errors import BadInput
from conversion_lib.families import deepseek_v2, deepseek_v3, deepseek_v32, llama3, qwen3
from conversion_lib.rules import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama3, qwen3, deepseek_v2, deepseek_v3, deepseek_v32)
}


def family_of(config: ModelConfig) -> Family:
    """The family that names the config's architecture.

    Raises BadInput where none does, with the nearest names.
    """
    for family in FAMILIES.values():
        if set(family.architectures) & set(config.architectures):
            return family
        if not config.architectures and family.model_type == config.model_type:
            return family
    known = [name for family in FAMILIES.values() for name in family.architectures]
    asked = ", ".join(config.architectures) or f"none (model_type {config.model_type or 'missing'})"
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.3) or known
    raise BadInput(
        f"{config.path}: architecture {asked} is not known; the nearest are {', '.join(near)}. "
        "Where it is one of these under another name, --model says which"
    )
