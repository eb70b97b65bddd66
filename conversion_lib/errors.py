"""The errors that reach a person, each with the exit code it ends a command with."""


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
