"""The errors that reach a person, each with the exit code it ends a command with."""

import re

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


def tensorstore_reason(error: BaseException) -> str:
    """What TensorStore says went wrong, in one line, without the spec and the answers that it adds."""
    return ANNOTATION.split(str(error), maxsplit=1)[0].splitlines()[0][:500]
