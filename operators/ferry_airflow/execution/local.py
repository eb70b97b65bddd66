"""The execution mode `local`: the command runs on this worker, as a subprocess of the task.

Its log lines (standard error) go to the task's log as they come. The JSON object that it prints (standard output) is
the result. The subprocess has its own process group, which ends with the subprocess, with the task, or when the task
is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from conversion_lib.core.child import Child
from conversion_lib.core.documents import parse_json
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.shown import one_line
from conversion_lib.storage.lease import HOLDER_VARIABLE
from ferry_airflow.execution.base import (
    ERROR_PREFIX,
    CommandResult,
    ExecutionMode,
    StageCommand,
    StageFailed,
    TaskIdentity,
    TaskLog,
    failure,
)

GRACE_SECONDS = 4.0
"""From SIGTERM to SIGKILL. Less than the 5 s after which Airflow's supervisor kills the task itself."""


class LocalSubprocess(ExecutionMode):
    """The execution mode `local`.

    Args:
        program: What to put before a command's arguments. None: this interpreter and the command's module.
        grace_seconds: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, program: Sequence[str] | None = None, grace_seconds: float = GRACE_SECONDS) -> None:
        self._program = program
        self._grace_seconds = grace_seconds
        self._child: Child | None = None
        self._killed = False

    def run(self, command: StageCommand, secrets: Mapping[str, str], task: TaskIdentity, log: TaskLog) -> CommandResult:
        """Runs a command as ExecutionMode says. The task's log gets its lines as they come."""
        program = [*(self._program or (sys.executable, "-m", command.module)), *command.arguments, "--json"]
        log.info("Running: %s", command)
        # A file, not a pipe: a full pipe would block the command while its log is read.
        with tempfile.TemporaryFile("w+") as results:
            exit_code, last_line = self._run_process(program, _environment(secrets, task), results, log)
            results.seek(0)
            result = _parse_result(results.read())
        if exit_code:
            raise failure(command, exit_code, _ending(exit_code), last_line, result or {})
        if result is None:
            raise StageFailed(f"{command.name} succeeded but printed no JSON object", OutsideFailure.exit_code, {})
        return result

    def kill(self) -> None:
        """Ends the process group: SIGTERM now, SIGKILL after the grace time. Returns at once; `run` waits for the end.

        A signal handler calls this, so it takes no lock that the interrupted code might hold.
        """
        self._killed = True
        if self._child is not None:
            self._child.end()

    def _run_process(
        self, command: Sequence[str], environment: Mapping[str, str], results: IO[str], log: TaskLog
    ) -> tuple[int, str]:
        """Exit code and last log line of the command."""
        self._killed = False
        with Child(
            command,
            grace_seconds=self._grace_seconds,
            env=environment,
            stdout=results,
            dies_with_parent=True,  # a leftover conversion would disturb the next try, which writes to the same place
        ) as child:
            self._child = child
            if self._killed:  # while it was starting
                child.end()
            try:
                last_line = _stream(child, log)
                return child.wait(), last_line
            finally:
                self._child = None


def _stream(child: Child, log: TaskLog) -> str:
    """Copies the command's log lines to `log` until it closes them; returns the last."""
    last = ""
    for line in child.lines():
        last = one_line(line)
        write = log.error if last.startswith(ERROR_PREFIX) else log.info
        write("%s", last)
    return last


def _environment(secrets: Mapping[str, str], task: TaskIdentity) -> dict[str, str]:
    """The task's environment without Airflow's own settings and connections, which ferry does not need."""
    withheld = ("AIRFLOW__", "AIRFLOW_CONN_", "AIRFLOW_VAR_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(withheld)}
    return {**inherited, "PYTHONUNBUFFERED": "1", HOLDER_VARIABLE: str(task), **secrets}


def _parse_result(text: str) -> CommandResult | None:
    try:
        return parse_json(text.encode(), "the command's result")
    except BadInput:
        return None


def _ending(exit_code: int) -> str:
    return f"was ended by {signal.strsignal(-exit_code)}" if exit_code < 0 else f"ended with exit code {exit_code}"


def execution_mode(stage: str, options: Mapping[str, Any]) -> LocalSubprocess:
    """Returns the mode of a stage.

    Raises:
        BadInput: There are options; this mode takes none.
    """
    if options:
        raise BadInput(f"the execution mode local takes no options: remove {', '.join(options)}")
    return LocalSubprocess()
