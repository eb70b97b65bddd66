"""What an execution mode is: a way to run a stage's command."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from conversion_lib.errors import BadInput, CheckFailed, FerryError, OutsideFailure, Terminated

CommandResult = dict[str, Any]

ERROR_PREFIX = "ferry: "
"""How a command begins the line that says why it ends."""


@dataclass(frozen=True)
class StageCommand:
    """What a stage runs: `python -m <module> <arguments> --json`.

    It says on standard error what it does, ends with one of the exit codes in conversion_lib.errors, and leaves one
    JSON object on standard output.
    """

    arguments: tuple[str, ...]
    module: str = "conversion_lib"

    FERRY: ClassVar[str] = "conversion_lib"
    STEPS: ClassVar[str] = "ferry_airflow.steps"

    @property
    def name(self) -> str:
        program = "ferry" if self.module == StageCommand.FERRY else f"python -m {self.module}"
        return f"{program} {self.arguments[0]}"

    def __str__(self) -> str:
        return " ".join([self.name, *self.arguments[1:]])


@dataclass(frozen=True)
class TaskIdentity:
    """Which task it is that runs; `map_index` is -1 where it is not mapped."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int


class TaskLog(Protocol):
    """The part of a task's log that an execution mode writes to."""

    def info(self, event: str, *args: Any) -> Any: ...
    def error(self, event: str, *args: Any) -> Any: ...


class StageFailed(FerryError):
    """A command ended with another exit code than 0. Its text is the command's error line.

    :param message: the command's last log line
    :param exit_code: as in conversion_lib.errors; negative where a signal ended it
    :param result: what the command printed as its result all the same, as a failed check does
    """

    def __init__(self, message: str, exit_code: int, result: CommandResult) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.result = result

    @property
    def meaning(self) -> type[FerryError]:
        """The kind of error that the exit code stands for: what decides on another try."""
        kinds: tuple[type[FerryError], ...] = (BadInput, CheckFailed, Terminated)
        return next((kind for kind in kinds if kind.exit_code == self.exit_code), OutsideFailure)


class ExecutionMode(ABC):
    """A way to run commands. It serves one command at a time."""

    @abstractmethod
    def run(self, command: StageCommand, secrets: Mapping[str, str], task: TaskIdentity, log: TaskLog) -> CommandResult:
        """Runs a command to its end and returns its result; raises StageFailed where it fails.

        A mode that need not be waited for raises Airflow's TaskDeferred with the method name `resume`; the event of
        its trigger then comes to `resume`.

        :param command: what to run; it is logged
        :param secrets: environment variables for it; never logged, and in no command line
        :param task: whose command it is: a command that outlives the task's process is found again by this
        :param log: the task's log
        """

    def resume(
        self, command: StageCommand, secrets: Mapping[str, str], event: Mapping[str, Any], log: TaskLog
    ) -> CommandResult:
        """Goes on when the trigger has fired; returns, raises and defers as `run` does."""
        raise NotImplementedError(f"{type(self).__name__} does not defer")

    @abstractmethod
    def kill(self) -> None:
        """Ends the command that is running, if one is; may be called from a signal handler."""


def failure(command: StageCommand, exit_code: int, ending: str, last_line: str, result: CommandResult) -> StageFailed:
    """What a command's end means: its own error line where it left one, else how it ended."""
    if last_line.startswith(ERROR_PREFIX):
        return StageFailed(last_line, exit_code, result)
    message = f"{command.name} {ending}; its last line: {last_line or 'none'}"
    # Python ends with 1 when it crashes; only with an error line does 1 mean a failed check.
    return StageFailed(message, OutsideFailure.exit_code if exit_code == 1 else exit_code, result)
