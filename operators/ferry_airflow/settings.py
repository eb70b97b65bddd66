"""Numbers that configuration gives by the environment."""

from __future__ import annotations

import os

from conversion_lib.errors import BadInput

LARGEST = 1e6


def number(variable: str, default: float, unit: str) -> float:
    """The value of an environment variable in `unit`; `default` where it is not set or empty.

    Raises BadInput, naming it, for what is no number from 0 to a million.
    """
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= LARGEST:
        raise BadInput(f"{variable} is {text!r}: expected a number of {unit}, from 0 to a million")
    return value
