"""Reads config.json of a Hugging Face checkpoint: each value as the type that it must have, in any spelling.

Code that needs a value asks for it here. So a null, a text instead of a number, or a size beyond all bounds is one line
that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from conversion_lib.core.documents import parse_json, read_limited
from conversion_lib.errors import BadInput
from conversion_lib.limits import JSON_BYTES
from conversion_lib.models.class_defaults import UNKNOWN, class_defaults, known_as

T = TypeVar("T")

CONFIG_NAME = "config.json"
QUANTIZATION_KEY = "quantization_config"

LARGEST = 2**31 - 1
"""The largest size. No model comes near it, and a product of sizes can still be shown."""

LARGEST_FLOAT = 3.4e38
"""About float32's largest: a larger number is infinite in any model."""

LIMITS = {"num_hidden_layers": 10_000}
"""The largest values of sizes that say how often something is built."""

DTYPE_KEYS = ("dtype", "torch_dtype")
DTYPE_PREFIX = "torch."
DTYPE_NAMES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
"""Other names of dtypes, torch's own and those of training frameworks."""

WRAPPERS = ("FSDP", "DDP")
"""Prefixes that training leaves in the name of a class: PyTorch's wrappers make `FSDPQwen3ForCausalLM` of it."""

NAMELESS = frozenset(
    {
        "DeepSpeedEngine",
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "OptimizedModule",
        "PeftModel",
        "PeftModelForCausalLM",
    }
)
"""Wrappers whose name does not contain the wrapped class; then only `model_type` says it."""


def shown(value: Any) -> str:
    """Returns a JSON value for a message: one short line."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


class Values:
    """The keys of a JSON object, each read as the type that it must have. Null is the same as a missing key.

    Args:
        values: The object.
        path: The file's name in messages.
        before: The prefix of a key in messages, such as `rope_scaling.`.
    """

    def __init__(self, values: Mapping[str, Any], path: Path | str, before: str = "") -> None:
        self.path = path
        self._values, self._before = values, before

    def get(self, key: str) -> Any:
        """Returns the value as it is; None if it is missing or null."""
        return self._values.get(key)

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns an integer.

        Args:
            key: The key.
            default: The value if the key is missing; None: it is required.
            least: The smallest value allowed.

        Raises:
            BadInput: The key is missing and has no default, or the value is not an integer from `least` to LARGEST.
        """
        value, most = self.get(key), LIMITS.get(key, LARGEST)
        if value is None:
            return self._left_out(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"an integer of at least {least}")
        if value > most:
            raise self.wrong(key, f"an integer of at most {most}")
        return value

    def optional_count(self, key: str, least: int = 1) -> int | None:
        """Returns an integer as `count` does; None if the key is missing."""
        return None if self.get(key) is None else self.count(key, least=least)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        least: float | None = None,
        above: float | None = None,
        most: float = LARGEST_FLOAT,
    ) -> float:
        """Returns a finite number.

        Args:
            key: The key.
            default: The value if the key is missing; None: it is required.
            least: The smallest value allowed; None: any.
            above: The value must be larger; None: any.
            most: The largest value allowed.

        Raises:
            BadInput: The key is missing and has no default, or the value is no such number.
        """
        value = self.get(key)
        if value is None:
            return self._left_out(key, default)
        # an integer of any length is JSON, and to Python so are NaN and Infinity
        fits = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_FLOAT <= value <= most
        if not fits or (least is not None and value < least) or (above is not None and value <= above):
            bounds = [f"of at least {least:g}"] if least is not None else []
            bounds += [f"above {above:g}"] if above is not None else []
            bounds += [f"at most {most:g}"] if most != LARGEST_FLOAT else []
            raise self.wrong(key, " ".join(["a number", " and ".join(bounds)]).strip())
        return float(value)

    def optional_number(self, key: str, *, least: float | None = None, above: float | None = None) -> float | None:
        """Returns a number as `number` does; None if the key is missing."""
        return None if self.get(key) is None else self.number(key, least=least, above=above)

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns a boolean. Raises BadInput for any other value, such as the text "false"."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Returns a text. Raises BadInput if the key is missing and has no default, or the value is not a text."""
        value = self.get(key)
        if value is None:
            return self._left_out(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str, one_for_each: str | None = None) -> tuple[str, ...] | None:
        """Returns a list of texts; None if the key is missing.

        Args:
            key: The key.
            one_for_each: The key of the number of entries; None: any number.

        Raises:
            BadInput: The value is not a list of texts, or has another number of entries.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(key, "a list of texts")
        if one_for_each is not None and len(value) != (length := self.count(one_for_each)):
            raise BadInput(
                f"{self.path}: {self.label(key)} has {len(value)} entries, expected {length}: one for each of "
                f"{one_for_each}"
            )
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """Returns a list of integers; empty if the key is missing."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(type(entry) is int for entry in value):
            raise self.wrong(key, "a list of integers")
        return tuple(value)

    def section(self, key: str) -> Values | None:
        """Returns an object; None if the key is missing. Raises BadInput if the value is not an object."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Values(value, self.path, f"{self._before}{key}.")

    def over(self, other: Values) -> Values:
        """Returns these keys, and the keys of `other` that are not among them."""
        return Values({**other._values, **self._values}, self.path, self._before)

    def sections(self) -> tuple[Values, ...]:
        """Returns the objects of all keys, without nulls."""
        found = (self.section(key) for key in self._values)
        return tuple(section for section in found if section is not None)

    @property
    def empty(self) -> bool:
        """Whether every key is null, or there is no key."""
        return all(value is None for value in self._values.values())

    def label(self, key: str) -> str:
        """Returns the name of a key in messages."""
        return f"{self._before}{key}"

    def wrong(self, key: str, expected: str) -> BadInput:
        """Returns the error that the value of a key is not as expected."""
        return BadInput(f"{self.path}: {self.label(key)} should be {expected}, not {shown(self.get(key))}")

    def _left_out(self, key: str, default: T | None) -> T:
        if default is None:
            raise BadInput(f"{self.path} has no {self.label(key)}, which this architecture needs")
        return default


class ModelConfig(Values):
    """A config.json. Keys of a nested `text_config` take precedence over the outer ones.

    A key that the file omits has the default of transformers' class.

    Args:
        raw: The JSON object.
        path: The file's name in messages.
        model_type: The `model_type` of the class whose defaults hold; None: the file's own.
    """

    def __init__(self, raw: dict[str, Any], path: Path | str, model_type: str | None = None) -> None:
        nested = raw.get("text_config")
        if nested is not None and not isinstance(nested, dict):
            raise BadInput(f"{path}: text_config should be an object, not {shown(nested)}")
        super().__init__({**raw, **nested} if nested else raw, path)
        self.raw = raw
        self._class = class_defaults().get(known_as(model_type or self.model_type), UNKNOWN)

    def of_class(self, model_type: str) -> ModelConfig:
        """Returns the same file with the defaults of another class, whatever `model_type` the file has."""
        return ModelConfig(self.raw, self.path, model_type)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of classes in `architectures`, without wrappers; BadInput if it is not a list of names."""
        value = self.raw.get("architectures")
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise BadInput(f"{self.path}: architectures should be a list of names, not {shown(value)}")
        return tuple(_unwrapped(name) for name in value if name not in NAMELESS)

    @property
    def model_type(self) -> str:
        """`model_type`; empty if it is missing."""
        value = self.raw.get("model_type")
        if value is None:
            return ""
        if not isinstance(value, str):
            raise BadInput(f"{self.path}: model_type should be a text, not {shown(value)}")
        return value

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config`; None if the checkpoint is not quantized."""
        value = self.raw.get(QUANTIZATION_KEY)
        if value is not None and not isinstance(value, dict):
            raise BadInput(f"{self.path}: {QUANTIZATION_KEY} should be an object, not {shown(value)}")
        return value

    @property
    def dtype(self) -> str | None:
        """The dtype in `dtype` or `torch_dtype`, without `torch.`; None if there is none."""
        # for a model that is more than text, files have it outside the text model, inside it, or both
        for values in (self.raw, self._values):
            for key in DTYPE_KEYS:
                value = values.get(key)
                if value is None:
                    continue
                if not isinstance(value, str):
                    raise BadInput(f"{self.path}: {key} should be a dtype's name, not {shown(value)}")
                name = value.removeprefix(DTYPE_PREFIX)
                return DTYPE_NAMES.get(name, name)
        return None

    def get(self, key: str) -> Any:
        """Returns the value as it is, under any of the class's names for the key, or the class's default.

        Raises:
            BadInput: Two names of one key have different values.
        """
        names, said = self._names(key), self._said(key)
        for name in said[1:]:
            if self._values[name] != self._values[said[0]]:
                raise BadInput(
                    f"{self.path}: {said[0]} is {shown(self._values[said[0]])} and {name} is "
                    f"{shown(self._values[name])}, and both mean the same"
                )
        if said:
            return self._values[said[0]]
        return None if names and key in self._class.null_is_none else self._class.defaults.get(key)

    def label(self, key: str) -> str:
        """Returns the name of a key in messages: the one that the file has."""
        return next(iter(self._said(key)), key)

    def _names(self, key: str) -> list[str]:
        """Returns the names of a key that are in the file."""
        return [name for name in (key, *self._class.other_names.get(key, ())) if name in self._values]

    def _said(self, key: str) -> list[str]:
        """Returns the names of a key that have a value in the file."""
        return [name for name in self._names(key) if self._values[name] is not None]

    def default(self, key: str) -> Any:
        """Returns what the class has if the file omits the key; None if that is nothing, or follows from others."""
        return self._class.defaults.get(key)

    def given(self, key: str) -> Any:
        """Returns the value that is in the file; None if the file omits the key."""
        return self._values.get(key)

    def omitted(self) -> tuple[str, ...]:
        """Returns the keys that the file omits and the class has a default for."""
        defaults = self._class.defaults.items()
        return tuple(key for key, default in defaults if default is not None and not self._said(key))

    def for_transformers(self) -> dict[str, Any]:
        """Returns the JSON object as transformers' class accepts it.

        The class refuses a null where Ferry uses its default, and a dtype in another spelling.
        """

        def plain(values: dict[str, Any]) -> dict[str, Any]:
            kept = {key: value for key, value in values.items() if value is not None or self._takes_null(key)}
            return {
                key: plain(value) if key == "text_config" else self.dtype if key in DTYPE_KEYS else value
                for key, value in kept.items()
            }

        return plain(self.raw)

    def _takes_null(self, key: str) -> bool:
        return key in self._class.null_is_none or self._class.defaults.get(key) is None


def _unwrapped(name: str) -> str:
    for prefix in WRAPPERS:
        inner = name.removeprefix(prefix)
        if inner != name and inner[:1].isupper():
            return _unwrapped(inner)
    return name


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
        content = read_limited(directory / CONFIG_NAME, JSON_BYTES)
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
    return ModelConfig(parse_json(content, path), path)
