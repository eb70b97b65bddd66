"""config.json of a Hugging Face checkpoint, in either of transformers' spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conversion_lib.errors import BadInput

CONFIG_NAME = "config.json"
QUANTIZATION_KEY = "quantization_config"


class ModelConfig:
    """A config.json; keys of a nested `text_config` come before those around it.

    Older and newer transformers differ in names (`torch_dtype` and `dtype`, `rope_theta` and `rope_parameters`);
    the properties here read both.
    """

    def __init__(self, raw: dict[str, Any], path: Path | str) -> None:
        self.raw, self.path = raw, path
        text = raw.get("text_config")
        self._flat: dict[str, Any] = {**raw, **text} if isinstance(text, dict) else raw

    @property
    def architectures(self) -> tuple[str, ...]:
        value = self.raw.get("architectures") or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise BadInput(f"{self.path}: architectures should be a list of names, not {value!r}")
        return tuple(value)

    @property
    def model_type(self) -> str:
        return str(self.raw.get("model_type", ""))

    @property
    def quantization(self) -> dict[str, Any] | None:
        value = self.raw.get(QUANTIZATION_KEY)
        return value if isinstance(value, dict) else None

    def get(self, key: str, default: Any = None) -> Any:
        value = self._flat.get(key)
        return default if value is None else value

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The integer under the first of `keys` that is there.

        Raises BadInput where there is none and no default, or where it is no integer of at least `least`.
        """
        for key in keys:
            value = self._flat.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadInput(f"{self.path}: {key} should be an integer of at least {least}, not {value!r}")
            return value
        if default is None:
            raise BadInput(f"{self.path} has no {' or '.join(keys)}, which this architecture needs")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.get(key, default))


def load_config(directory: Path, name: str | None = None) -> ModelConfig:
    """Reads `directory`/config.json; `name` is what messages call the directory, where that is a copy.

    Raises BadInput where it is missing, not JSON, or not an object.
    """
    name = name or str(directory)
    try:
        content = (directory / CONFIG_NAME).read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{name} has no {CONFIG_NAME}: a Hugging Face checkpoint needs one") from None
    return config_of(content, f"{name}/{CONFIG_NAME}")


def config_of(content: bytes, path: str) -> ModelConfig:
    """The config.json at `path`, by its content. Raises BadInput where it is not JSON, or not an object."""
    try:
        raw = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path} should hold a JSON object, not {type(raw).__name__}")
    return ModelConfig(raw, path)
