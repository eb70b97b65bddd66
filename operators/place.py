"""What a place is: somewhere that runs a stage's `ferry` command. `local.py` is one; a new place is a new module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from conversion_lib.errors import FerryError


class StageFailed(FerryError):
    """A ferry command ended with another exit code than 0. Its text is the command's error line.

    :param message: the command's last log line
    :param exit_code: as in conversion_lib.errors; negative where a signal ended it
    :param result: what the command printed as its result all the same, as a failed check does
    """

    def __init__(self, message: str, exit_code: int, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.result = result


class TaskLog(Protocol):
    """The part of a task's log that a place writes to."""

    def info(self, event: str, *args: Any) -> Any: ...
    def error(self, event: str, *args: Any) -> Any: ...


class Place(Protocol):
    """Somewhere that runs ferry commands."""

    def run(self, arguments: Sequence[str], secrets: Mapping[str, str], log: TaskLog) -> dict[str, Any]:
        """Runs `ferry <arguments>` to its end and returns its result; raises StageFailed where it fails."""

    def kill(self) -> None:
        """Ends the command that is running, if one is; may be called from a signal handler."""
