"""The base of execution modes: ways to run a stage's command."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from conversion_lib.errors import BadInput, CheckFailed, FerryError, OutsideFailure, Terminated

CommandResult = dict[str, Any]

ERROR_PREFIX = "ferry: "
"""The beginning of the line in which a command says why it failed."""


WAITS_FOR = "waits_for"
"""In the result of a command that found another run at work: who that is."""


@dataclass(frozen=True)
class StageCommand:
    """What a stage runs: `python -m <module> <arguments> --json`.

    The command logs to standard error, prints one JSON object to standard output, and ends with an exit code of
    conversion_lib.errors.

    Attributes:
        arguments: Of the command line; the first is the name of the command.
        module: FERRY, REDO (ferry, which makes changed output again), or STEPS.
    """

    arguments: tuple[str, ...]
    module: str = "conversion_lib"

    FERRY: ClassVar[str] = "conversion_lib"
    REDO: ClassVar[str] = "ferry_airflow.steps.redo"
    STEPS: ClassVar[str] = "ferry_airflow.steps"

    @property
    def name(self) -> str:
        """The program and the command, such as `ferry convert`."""
        program = "ferry" if self.module in (StageCommand.FERRY, StageCommand.REDO) else f"python -m {self.module}"
        return f"{program} {self.arguments[0]}"

    def __str__(self) -> str:
        return " ".join([self.name, *self.arguments[1:]])


@dataclass(frozen=True)
class TaskIdentity:
    """Which task is running; `map_index` is -1 if the task is not mapped."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int

    def __str__(self) -> str:
        """Whom a command works for, as the log of a run that waits for it says."""
        part = "" if self.map_index < 0 else f" {self.map_index}"
        return f"{self.task_id}{part} of run {self.run_id} of {self.dag_id}"


class TaskLog(Protocol):
    """The methods of a task's log that an execution mode uses."""

    def info(self, event: str, *args: Any) -> Any: ...
    def error(self, event: str, *args: Any) -> Any: ...


class StageFailed(FerryError):
    """A command failed. The text is the command's error line, or says how it ended.

    Attributes:
        exit_code: As in conversion_lib.errors; negative if a signal ended the command.
        result: The result that the command printed in spite of the failure, as a failed check does; else empty.
    """

    def __init__(self, message: str, exit_code: int, result: CommandResult) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.result = result

    @property
    def meaning(self) -> type[FerryError]:
        """The class of error that the exit code stands for. It decides whether the task is retried."""
        kinds: tuple[type[FerryError], ...] = (BadInput, CheckFailed, Terminated)
        return next((kind for kind in kinds if kind.exit_code == self.exit_code), OutsideFailure)


class ExecutionMode(ABC):
    """A way to run commands, one at a time."""

    def __repr__(self) -> str:
        """The class's name alone: Airflow keeps this text in a mapped task's DAG, and an address would change it."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @abstractmethod
    def run(self, command: StageCommand, secrets: Mapping[str, str], task: TaskIdentity, log: TaskLog) -> CommandResult:
        """Runs a command to its end and returns its result.

        Args:
            command: What to run. It is logged.
            secrets: Environment variables for the command. They never appear in a log or a command line.
            task: The task that runs the command. If the command outlives the task's process, a retry finds it by this.
            log: The task's log.

        Raises:
            StageFailed: The command failed.
            BadInput: The command cannot be started, and a retry does not help.
            OutsideFailure: The command cannot be started or is lost, and a retry may help.
            TaskDeferred: The mode does not wait. Its method is `resume`, which gets the event of its trigger.
        """

    def resume(
        self, command: StageCommand, secrets: Mapping[str, str], event: Mapping[str, Any], log: TaskLog
    ) -> CommandResult:
        """Continues after the trigger fired with `event`. Returns and raises as `run` does."""
        raise NotImplementedError(f"{type(self).__name__} does not defer")

    @abstractmethod
    def kill(self) -> None:
        """Ends the running command, if there is one. May be called from a signal handler."""


def failure(command: StageCommand, exit_code: int, ending: str, last_line: str, result: CommandResult) -> StageFailed:
    """Returns the error for a failed command: its own error line if there is one, else how it ended.

    Args:
        command: The command that failed.
        exit_code: Its exit code; negative if a signal ended it.
        ending: How it ended, such as `ended with exit code 9`.
        last_line: The last line of its log; may be empty.
        result: What it printed as its result; may be empty.
    """
    if last_line.startswith(ERROR_PREFIX):
        return StageFailed(last_line, exit_code, result)
    message = f"{command.name} {ending}; its last line: {last_line or 'none'}"
    # Python exits with 1 when it crashes. Only with an error line does 1 mean a failed check.
    return StageFailed(message, OutsideFailure.exit_code if exit_code == 1 else exit_code, result)
