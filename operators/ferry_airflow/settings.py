"""Numeric settings from environment variables."""

from __future__ import annotations

import os

from conversion_lib.errors import BadInput

LARGEST = 1e6


def number(variable: str, default: float, unit: str) -> float:
    """Reads a number from an environment variable.

    Args:
        variable: The variable's name.
        default: The value if the variable is not set or is empty.
        unit: The unit, such as `seconds`, for the error message.

    Raises:
        BadInput: The value is not a number from 0 to a million.
    """
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= LARGEST:
        raise BadInput(f"{variable} is {text!r}: expected a number of {unit}, from 0 to a million")
    return value
