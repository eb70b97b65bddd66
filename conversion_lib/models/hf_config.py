"""Reads config.json of a Hugging Face checkpoint, in either of transformers' spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conversion_lib.errors import BadInput

CONFIG_NAME = "config.json"
QUANTIZATION_KEY = "quantization_config"


class ModelConfig:
    """A config.json. Keys of a nested `text_config` take precedence over the outer ones.

    Older and newer transformers use different names (`torch_dtype` and `dtype`, `rope_theta` and `rope_parameters`).
    The properties read both.

    Attributes:
        raw: The JSON object.
        path: The file's name in messages.
    """

    def __init__(self, raw: dict[str, Any], path: Path | str) -> None:
        self.raw, self.path = raw, path
        text = raw.get("text_config")
        self._flat: dict[str, Any] = {**raw, **text} if isinstance(text, dict) else raw

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of classes in `architectures`; BadInput if it is not a list of names."""
        value = self.raw.get("architectures") or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise BadInput(f"{self.path}: architectures should be a list of names, not {value!r}")
        return tuple(value)

    @property
    def model_type(self) -> str:
        """`model_type`; empty if it is missing."""
        return str(self.raw.get("model_type", ""))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config`; None if the checkpoint is not quantized."""
        value = self.raw.get(QUANTIZATION_KEY)
        return value if isinstance(value, dict) else None

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, or `default` if it is missing or null."""
        value = self._flat.get(key)
        return default if value is None else value

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """Returns an integer.

        Args:
            *keys: Names of the same value. The first one that exists is used.
            default: The value if there is no such key; None: a key is required.
            least: The smallest value allowed.

        Raises:
            BadInput: There is no such key and no default, or the value is not an integer of at least `least`.
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
        """Returns the truth of a key's value, or `default` if it is missing or null."""
        return bool(self.get(key, default))


def load_config(directory: Path, name: str | None = None) -> ModelConfig:
    """Reads config.json.

    Args:
        directory: The directory of the file.
        name: The directory's name in messages, if the directory is a copy; None: its path.

    Raises:
        BadInput: The file is missing, is not JSON, or is not an object.
    """
    name = name or str(directory)
    try:
        content = (directory / CONFIG_NAME).read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{name} has no {CONFIG_NAME}: a Hugging Face checkpoint needs one") from None
    return config_of(content, f"{name}/{CONFIG_NAME}")


def config_of(content: bytes, path: str) -> ModelConfig:
    """Parses the content of a config.json.

    Args:
        content: The content.
        path: The file's name in messages.

    Raises:
        BadInput: It is not JSON, or not an object.
    """
    try:
        raw = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path} should be a JSON object, not {type(raw).__name__}")
    return ModelConfig(raw, path)
