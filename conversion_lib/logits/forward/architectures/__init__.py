"""A Hugging Face `config.json` as a ForwardConfig, one reader an architecture.

They say once more, and on purpose, what `conversion_lib.families` says: the check must not share its mistakes.
"""

from __future__ import annotations

from collections.abc import Callable

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures import cycles, deepseek, delta_nets, gemma4, grouped
from conversion_lib.logits.forward.architectures.common import Raw
from conversion_lib.logits.forward.config import ForwardConfig

READERS: dict[str, Callable[[Raw], ForwardConfig]] = {
    "llama": grouped.llama,
    "mixtral": grouped.mixtral,
    "qwen2": grouped.qwen2,
    "qwen3": grouped.qwen3,
    "qwen3_moe": grouped.qwen3_moe,
    "gpt_oss": cycles.gpt_oss,
    "gemma2": cycles.gemma2,
    "gemma3": cycles.gemma3,
    "gemma3_text": cycles.gemma3,
    "gemma4": gemma4.gemma4,
    "gemma4_text": gemma4.gemma4,
    "olmo3": cycles.olmo3,
    "qwen3_next": delta_nets.qwen3_next,
    "qwen3_5_moe": delta_nets.qwen3_5,
    "qwen3_5_moe_text": delta_nets.qwen3_5,
    "deepseek_v2": deepseek.parse,
    "deepseek_v3": deepseek.parse,
    "deepseek_v32": deepseek.parse,
    "kimi_k2": deepseek.parse,
}
"""By config.json's `model_type`."""


def parse_config(raw: Raw) -> ForwardConfig:
    """The contents of a `config.json` as a ForwardConfig.

    Raises BadInput for an architecture or a setting that the forward pass does not have.
    """
    text = raw.get("text_config")
    flat = {**raw, **text, "model_type": raw.get("model_type")} if isinstance(text, dict) else raw
    kind = str(flat.get("model_type"))
    if kind not in READERS:
        raise BadInput(f"no logit check for model_type {kind!r}; there is one for {', '.join(READERS)}")
    return READERS[kind](flat)
