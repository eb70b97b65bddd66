"""Parses a Hugging Face `config.json` into a ForwardConfig, with one reader for each architecture.

On purpose, the readers repeat what `conversion_lib.families` says: the check must not share its mistakes.
"""

from __future__ import annotations

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures import cycles, deepseek, delta_nets, gemma4, grouped
from conversion_lib.logits.forward.architectures.common import Raw, Readers
from conversion_lib.logits.forward.config import ForwardConfig

READERS: Readers = {
    **grouped.READERS,
    **cycles.READERS,
    **gemma4.READERS,
    **delta_nets.READERS,
    **deepseek.READERS,
}
"""Readers by the `model_type` of config.json."""


def parse_config(raw: Raw) -> ForwardConfig:
    """Parses the contents of a `config.json`; of a multimodal model, the text model is read.

    Raises:
        BadInput: The forward pass does not have the architecture or a setting, or a value is wrong.
    """
    text = raw.get("text_config")
    flat = {**raw, **text, "model_type": raw.get("model_type")} if isinstance(text, dict) else raw
    kind = str(flat.get("model_type"))
    if kind not in READERS:
        raise BadInput(
            f"config.json: no logit check for architecture {_architecture(flat)} (model_type {kind!r}): "
            "conversion_lib/logits/forward/architectures has no reader for it; there is one for "
            f"{', '.join(READERS)}. docs/add_a_family.md explains how to write one; `ferry publish --unchecked` "
            "publishes without a check"
        )
    return READERS[kind](flat)


def _architecture(raw: Raw) -> str:
    names = raw.get("architectures")
    return ", ".join(map(str, names)) if isinstance(names, list) and names else "unknown"
