"""The errors that reach a person, each with the exit code it ends a command with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

ANNOTATION = re.compile(r" \[(tensorstore_spec|source locations|[a-z]+_[a-z_]+)=?'")
"""Where TensorStore begins to add to what it says: its whole spec, the answer's body and code."""


class FerryError(Exception):
    """Anything that ends a command; its text is one line that says what, where, and what to do."""

    exit_code = 3


class CheckFailed(FerryError):
    """A check ran and failed: logits, compare, verify."""

    exit_code = 1


class BadInput(FerryError):
    """The input is wrong; trying again without changing it is of no use."""

    exit_code = 2


class OutsideFailure(FerryError):
    """Something outside failed (disk full midway, network); a retry may help."""

    exit_code = 3


class Terminated(FerryError):
    """Ended by SIGTERM; what was finished is kept."""

    exit_code = 143


def problem_of(error: ValidationError, label: Callable[[str], str] | None = None) -> str:
    """The first thing that a validation found wrong, in one line: `field: what is wrong`.

    Args:
        error: what pydantic raised.
        label: what the line begins with instead, by the field's name; the value follows it, such as `--threads 0`.
    """
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    # a message about the whole has no field; one of ours is no "Value error" to a person
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    if label is not None:
        return f"{label(field)}{first['input']}: {problem}"
    return f"{field}: {problem}" if field else problem


def tensorstore_reason(error: BaseException) -> str:
    """What TensorStore says went wrong, in one line, without the spec and the answers that it adds."""
    return ANNOTATION.split(str(error), maxsplit=1)[0].splitlines()[0][:500]
