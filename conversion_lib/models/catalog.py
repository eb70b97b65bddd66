"""The models that Ferry knows by name: MaxText's name, the family, and the repository on the Hub.

`--model NAME` chooses the family for a checkpoint if its config does not.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from conversion_lib.errors import BadInput


@dataclass(frozen=True)
class Model:
    """A model.

    Attributes:
        name: MaxText's `model_name`, or Ferry's own if MaxText has none.
        family: The name of the family.
        repo: The repository of its weights on the Hub.
        also: Repositories with the same weights in another form.
    """

    name: str
    family: str
    repo: str
    also: tuple[str, ...] = ()


MODELS = (
    Model("llama3.1-8b", "llama3.1", "meta-llama/Llama-3.1-8B"),
    Model("llama3.1-70b", "llama3.1", "meta-llama/Llama-3.1-70B"),
    Model("llama3.1-405b", "llama3.1", "meta-llama/Llama-3.1-405B"),
    Model("llama3.2-1b", "llama3.1", "meta-llama/Llama-3.2-1B"),
    Model("llama3.2-3b", "llama3.1", "meta-llama/Llama-3.2-3B"),
    Model("llama3.3-70b", "llama3.1", "meta-llama/Llama-3.3-70B-Instruct"),
    Model("qwen2.5-1.5b", "qwen2.5", "Qwen/Qwen2.5-1.5B-Instruct"),
    Model("qwen2.5-7b", "qwen2.5", "Qwen/Qwen2.5-7B-Instruct"),
    Model("qwen2.5-14b", "qwen2.5", "Qwen/Qwen2.5-14B-Instruct"),
    Model("qwen3-0.6b", "qwen3", "Qwen/Qwen3-0.6B"),
    Model("qwen3-1.7b", "qwen3", "Qwen/Qwen3-1.7B"),
    Model("qwen3-4b", "qwen3", "Qwen/Qwen3-4B"),
    Model("qwen3-8b", "qwen3", "Qwen/Qwen3-8B"),
    Model("qwen3-14b", "qwen3", "Qwen/Qwen3-14B"),
    Model("qwen3-32b", "qwen3", "Qwen/Qwen3-32B"),
    Model("qwen3-30b-a3b", "qwen3_moe", "Qwen/Qwen3-30B-A3B-Thinking-2507"),
    Model("qwen3-235b-a22b", "qwen3_moe", "Qwen/Qwen3-235B-A22B-Thinking-2507"),
    Model("qwen3-480b-a35b", "qwen3_moe", "Qwen/Qwen3-Coder-480B-A35B-Instruct"),
    Model("qwen3-next-80b-a3b", "qwen3_next", "Qwen/Qwen3-Next-80B-A3B-Instruct"),
    Model("qwen3.5-35b-a3b", "qwen3.5", "Qwen/Qwen3.5-35B-A3B"),
    Model("qwen3.5-397b-a17b", "qwen3.5", "Qwen/Qwen3.5-397B-A17B"),
    Model("mixtral-8x7b", "mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    Model("mixtral-8x22b", "mixtral", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
    Model("gpt-oss-20b", "gpt_oss", "openai/gpt-oss-20b", also=("unsloth/gpt-oss-20b-BF16",)),
    Model("gpt-oss-120b", "gpt_oss", "openai/gpt-oss-120b", also=("unsloth/gpt-oss-120b-BF16",)),
    Model("gemma2-2b", "gemma2", "google/gemma-2-2b"),
    Model("gemma2-9b", "gemma2", "google/gemma-2-9b"),
    Model("gemma2-27b", "gemma2", "google/gemma-2-27b"),
    Model("gemma3-4b", "gemma3", "google/gemma-3-4b-it"),
    Model("gemma3-12b", "gemma3", "google/gemma-3-12b-it"),
    Model("gemma3-27b", "gemma3", "google/gemma-3-27b-it"),
    Model("gemma4-26b", "gemma4", "google/gemma-4-26b-a4b-it"),
    Model("gemma4-31b", "gemma4", "google/gemma-4-31b-it"),
    Model("gemma4-e2b", "gemma4_small", "google/gemma-4-E2B-it"),
    Model("gemma4-e4b", "gemma4_small", "google/gemma-4-E4B-it"),
    Model("olmo3-7b", "olmo3", "allenai/Olmo-3-7B-Instruct"),
    Model("olmo3-32b", "olmo3", "allenai/Olmo-3-32B-Think"),
    Model("deepseek2-16b", "deepseek_v2", "deepseek-ai/DeepSeek-V2-Lite"),
    Model("deepseek3-671b", "deepseek_v3", "deepseek-ai/DeepSeek-V3"),
    Model("deepseek3.1-671b", "deepseek_v3", "deepseek-ai/DeepSeek-V3.1"),
    Model("deepseek3.2-671b", "deepseek_v32", "deepseek-ai/DeepSeek-V3.2"),
    Model("kimi-k2-1t", "deepseek_v3", "moonshotai/Kimi-K2-Instruct"),
    Model("kimi-k2-thinking-1t", "deepseek_v3", "moonshotai/Kimi-K2-Thinking"),
)

SIBLINGS: dict[str, tuple[str, str]] = {
    "llama3.1-8b-Instruct": ("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
    "llama3.1-70b-Instruct": ("llama3.1-70b", "meta-llama/Llama-3.1-70B-Instruct"),
    "qwen3-1.7b-base": ("qwen3-1.7b", "Qwen/Qwen3-1.7B-Base"),
    "qwen3-4b-base": ("qwen3-4b", "Qwen/Qwen3-4B-Base"),
    "qwen3-4b-thinking-2507": ("qwen3-4b", "Qwen/Qwen3-4B-Thinking-2507"),
    "qwen3-8b-base": ("qwen3-8b", "Qwen/Qwen3-8B-Base"),
    "qwen3-14b-base": ("qwen3-14b", "Qwen/Qwen3-14B-Base"),
    "qwen3-30b-a3b-base": ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B-Base"),
    "qwen3.5-35b-a3b-fp8": ("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B-FP8"),
    "qwen3.5-35b-fp8": ("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B-FP8"),
    "qwen3.5-397b-a17b-fp8": ("qwen3.5-397b-a17b", "Qwen/Qwen3.5-397B-A17B-FP8"),
    "olmo3-7b-pt": ("olmo3-7b", "allenai/Olmo-3-1025-7B"),
    "deepseek3-671b-2dfsdp": ("deepseek3-671b", "deepseek-ai/DeepSeek-V3"),
    "deepseek3-671b-batchsplit": ("deepseek3-671b", "deepseek-ai/DeepSeek-V3"),
}
"""MaxText's other names for models with the same sizes: the name above, and the repository on the Hub."""

OWNER_SEPARATOR = "--"
_BY_NAME = {model.name: model for model in MODELS}


def model_named(name: str) -> Model:
    """Returns the model with this name.

    Raises:
        BadInput: There is none; the message has the nearest names.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0)
    raise BadInput(f"no model is named {name}; the nearest are {', '.join(near)} (`ferry models` lists all)")


def published_name(repo: str | None, fallback: str) -> str:
    """Returns the name under which a checkpoint is published: lower case letters, digits and `._-`.

    Args:
        repo: The repository that its weights came from; None if it is not known.
        fallback: Text to make the name from without a repository, such as the path.

    Returns:
        For a repository of the catalogue, the catalogue's name. Another repository keeps its owner, as in
        `someone--qwen3-0.6b`. A checkpoint without a repository never gets a name of the catalogue.
    """
    for model in MODELS:
        if repo and repo.lower() in (known.lower() for known in (model.repo, *model.also)):
            return model.name
    if repo and "/" in repo:
        return OWNER_SEPARATOR.join(_plain(part) for part in repo.split("/"))
    name = _plain((repo or fallback).rstrip("/").split("/")[-1])
    return f"local-{name}" if name in _BY_NAME else name


def _plain(name: str) -> str:
    """Returns a name in lower case, with single hyphens: no name on the Hub has two in a row."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "model"
