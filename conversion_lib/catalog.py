"""The models that Ferry knows by name: MaxText's name, the family, the repository on the Hub.

`--model NAME` picks the family for a checkpoint whose config does not say which it is.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from conversion_lib.errors import BadInput


@dataclass(frozen=True)
class Model:
    """name: MaxText's `model_name`. repo: where its weights are published on the Hub."""

    name: str
    family: str
    repo: str


MODELS = (
    Model("qwen3-0.6b", "qwen3", "Qwen/Qwen3-0.6B"),
    Model("qwen3-1.7b", "qwen3", "Qwen/Qwen3-1.7B"),
    Model("qwen3-4b", "qwen3", "Qwen/Qwen3-4B"),
    Model("qwen3-8b", "qwen3", "Qwen/Qwen3-8B"),
    Model("qwen3-14b", "qwen3", "Qwen/Qwen3-14B"),
    Model("qwen3-32b", "qwen3", "Qwen/Qwen3-32B"),
    Model("llama3.1-8b", "llama3.1", "meta-llama/Llama-3.1-8B"),
    Model("llama3.1-70b", "llama3.1", "meta-llama/Llama-3.1-70B"),
    Model("llama3.1-405b", "llama3.1", "meta-llama/Llama-3.1-405B"),
    Model("deepseek2-16b", "deepseek_v2", "deepseek-ai/DeepSeek-V2-Lite"),
    Model("deepseek3-671b", "deepseek_v3", "deepseek-ai/DeepSeek-V3"),
    Model("deepseek3.2-671b", "deepseek_v32", "deepseek-ai/DeepSeek-V3.2"),
)

_BY_NAME = {model.name: model for model in MODELS}


def model_named(name: str) -> Model:
    """The model of that name. Raises BadInput where there is none, with the nearest names."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.3) or sorted(_BY_NAME)
    raise BadInput(f"no model is named {name}; the nearest are {', '.join(near)} (`ferry models` lists all)")


def published_name(repo: str | None, fallback: str) -> str:
    """The name that a checkpoint is published under: the catalogue's for its repository, else one made of it."""
    for model in MODELS:
        if repo and model.repo.lower() == repo.lower():
            return model.name
    stem = (repo or fallback).rstrip("/").split("/")[-1].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-.") or "model"
