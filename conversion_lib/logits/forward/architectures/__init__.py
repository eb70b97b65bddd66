"""Parses a Hugging Face `config.json` into a ForwardConfig, with one reader for each architecture.

On purpose, the readers repeat what `conversion_lib.families` says: the check must not share its mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures import cycles, deepseek, delta_nets, gemma4, grouped
from conversion_lib.logits.forward.architectures.common import Readers
from conversion_lib.logits.forward.config import ForwardConfig
from conversion_lib.models.hf_config import CONFIG_NAME, ModelConfig

READERS: Readers = {
    **grouped.READERS,
    **cycles.READERS,
    **gemma4.READERS,
    **delta_nets.READERS,
    **deepseek.READERS,
}
"""Readers by the `model_type` of config.json."""


def parse_config(raw: Mapping[str, Any], path: Path | str = CONFIG_NAME) -> ForwardConfig:
    """Parses the contents of a `config.json`; of a multimodal model, the text model is read.

    Args:
        raw: The contents.
        path: The file's name in messages.

    Raises:
        BadInput: The forward pass does not have the architecture or a setting, or a value is wrong.
    """
    config = ModelConfig(dict(raw), path)
    if config.model_type not in READERS:
        raise BadInput(
            f"{path}: no logit check for architecture {', '.join(config.architectures) or 'unknown'} (model_type "
            f"{config.model_type!r}): conversion_lib/logits/forward/architectures has no reader for it; there is one "
            f"for {', '.join(READERS)}. docs/add_a_family.md explains how to write one; `ferry publish --unchecked` "
            "publishes without a check"
        )
    return READERS[config.model_type](config)
