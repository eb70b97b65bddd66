"""The defaults of transformers' classes for keys that a config.json omits: `class_defaults.json`.

The file lists only keys that change shapes or the function. `tests/conversion_lib/models/test_class_defaults.py`
compares it with the classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

PATH = Path(__file__).with_suffix(".json")


class ClassDefaults(BaseModel):
    """The defaults of one class.

    Attributes:
        other_model_types: Other values of `model_type` that mean this class.
        defaults: The defaults by key; None: the class has no default, or computes it from other keys.
        null_is_none: Keys whose null means none, such as no window. For other keys, null means the default.
        other_names: Other names that the class accepts for a key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    other_model_types: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}
    null_is_none: frozenset[str] = frozenset()
    other_names: Mapping[str, tuple[str, ...]] = {}


UNKNOWN = ClassDefaults()
"""For a class that is not in the file: it has no defaults."""


@functools.cache
def class_defaults() -> dict[str, ClassDefaults]:
    """Returns all classes by `model_type`."""
    return TypeAdapter(dict[str, ClassDefaults]).validate_json(PATH.read_bytes())


@functools.cache
def known_as(model_type: str) -> str:
    """Returns the `model_type` of the class that a `model_type` means; the same if the class is not known."""
    also = (name for name, known in class_defaults().items() if model_type in known.other_model_types)
    return next(also, model_type)
