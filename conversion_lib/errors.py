"""The errors that users see, each with the exit code of the command that it ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from conversion_lib.shown import one_line

if TYPE_CHECKING:
    from pydantic import ValidationError

ANNOTATION = re.compile(r" \[(tensorstore_spec|source locations|[a-z]+_[a-z_]+)=?'")
"""Start of what TensorStore appends to its messages: the whole spec, the response's body and code."""


class FerryError(Exception):
    """An error that ends a command. Its text is one line that says what is wrong, where, and what to do.

    Args:
        message: The text. It is escaped and made one line here, since it may have names from outside.
    """

    exit_code = 3

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))

    @property
    def details(self) -> dict[str, str]:
        """What --json tells of the error besides its text."""
        return {}


class CheckFailed(FerryError):
    """A check ran and failed: logits, compare, verify."""

    exit_code = 1


class BadInput(FerryError):
    """The input is wrong. A retry with the same input fails again."""

    exit_code = 2


class OutsideFailure(FerryError):
    """Something outside failed, such as the network or a full disk. A retry may help."""

    exit_code = 3


class Terminated(FerryError):
    """SIGTERM ended the command. Finished work is kept."""

    exit_code = 143


def problem_of(error: ValidationError, label: Callable[[str], str] | None = None) -> str:
    """Returns the first problem that a validation found, as one line: `field: problem`.

    Args:
        error: What pydantic raised.
        label: Returns the start of the line for a field name, such as `--threads `. The invalid value and the problem
            follow. None: the line starts with the field name.
    """
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    # a message about the whole model has no field; our own messages need no "Value error"
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    if label is not None:
        return f"{label(field)}{first['input']}: {problem}"
    return f"{field}: {problem}" if field else problem


def tensorstore_reason(error: BaseException) -> str:
    """Returns TensorStore's reason for an error as one line, without the spec and responses that it appends."""
    return ANNOTATION.split(str(error), maxsplit=1)[0].splitlines()[0][:500]
