"""JSON that every parser reads: numbers that are not finite are text, as pydantic writes them in check.json."""

from __future__ import annotations

import json
import math
from typing import Any

NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""What stands for a number that is not finite."""


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as strict JSON. `float` reads the text of a number that is not finite."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Returns a value with `NaN`, `Infinity` and `-Infinity` as text, at any depth; tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value
