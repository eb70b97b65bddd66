"""The execution mode `local`: this worker, with the command as a subprocess of the task.

Its log lines (standard error) go into the task's log as they come; its one JSON object (standard output)
is the result. The subprocess leads a process group of its own, which ends with it, with the task, or when
the task is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from conversion_lib.core.child import Child
from conversion_lib.errors import BadInput, OutsideFailure
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
"""From SIGTERM to SIGKILL: less than the 5 s after which Airflow's supervisor kills the task itself."""


class LocalSubprocess(ExecutionMode):
    """The execution mode `local`.

    :param program: what to put before a command's arguments; default: this interpreter and the command's module
    :param grace_seconds: time between SIGTERM and SIGKILL in seconds; default 4
    """

    def __init__(self, program: Sequence[str] | None = None, grace_seconds: float = GRACE_SECONDS) -> None:
        self._program = program
        self._grace_seconds = grace_seconds
        self._child: Child | None = None
        self._killed = False

    def run(self, command: StageCommand, secrets: Mapping[str, str], task: TaskIdentity, log: TaskLog) -> CommandResult:
        """As ExecutionMode has it; the task's log gets the command's lines as they come."""
        program = [*(self._program or (sys.executable, "-m", command.module)), *command.arguments, "--json"]
        log.info("Running: %s", command)
        # A file, not a pipe: nobody need read it while the log lines are read.
        with tempfile.TemporaryFile("w+") as results:
            exit_code, last_line = self._run_process(program, _environment(secrets), results, log)
            results.seek(0)
            result = _parse_result(results.read())
        if exit_code:
            raise failure(command, exit_code, _ending(exit_code), last_line, result or {})
        if result is None:
            raise StageFailed(f"{command.name} ended well but printed no JSON object", OutsideFailure.exit_code, {})
        return result

    def kill(self) -> None:
        """Ends the process group: SIGTERM now, SIGKILL after the grace. Returns at once; `run` sees the end.

        It is called from a signal handler, so it takes no lock that the interrupted code might hold.
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
            dies_with_parent=True,  # a conversion left over would meet the next try at the same destination
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
    for last in child.lines():
        write = log.error if last.startswith(ERROR_PREFIX) else log.info
        write("%s", last)
    return last


def _environment(secrets: Mapping[str, str]) -> dict[str, str]:
    """The task's environment without Airflow's own settings and connections: ferry has no use for them."""
    withheld = ("AIRFLOW__", "AIRFLOW_CONN_", "AIRFLOW_VAR_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(withheld)}
    return {**inherited, "PYTHONUNBUFFERED": "1", **secrets}


def _parse_result(text: str) -> CommandResult | None:
    try:
        result = json.loads(text)
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def _ending(exit_code: int) -> str:
    return f"was ended by {signal.strsignal(-exit_code)}" if exit_code < 0 else f"ended with exit code {exit_code}"


def execution_mode(stage: str, options: Mapping[str, Any]) -> LocalSubprocess:
    """The mode of a stage; it takes no options."""
    if options:
        raise BadInput(f"the execution mode local takes no options, and there are {', '.join(options)}")
    return LocalSubprocess()
