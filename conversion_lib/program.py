"""Runs a command as a process: signals, exit codes, and the result as text or as one JSON object.

`ferry`, MaxText's command lines and conversions on the fly share it. Results go to standard output; progress, messages
and errors go to standard error.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from pydantic import BaseModel
from rich.console import RenderableType
from rich.text import Text

from conversion_lib.core.memory_bound import ends_process_by
from conversion_lib.core.plain_json import to_json
from conversion_lib.core.process import peak_bytes
from conversion_lib.errors import FerryError, Terminated
from conversion_lib.progress import PlainConsole, Reporter
from conversion_lib.shown import escaped, one_line
from conversion_lib.storage.files import disk_error

LogFormat = Literal["text", "json"]
LEAVE_SECONDS = 4.5
"""Longest time from SIGTERM to exit: Airflow sends SIGKILL after five seconds."""
ENDED = "ended by SIGTERM; finished work is kept, and the same command resumes from there"


@dataclass
class Outcome:
    """What a command returns.

    Attributes:
        result: Printed with --json.
        text: Printed without --json.
        failed: Whether a check ran and failed. The exit code is then 1.
        message: Why it failed, for standard error.
    """

    result: BaseModel | dict[str, Any]
    text: list[RenderableType] = field(default_factory=list)
    failed: bool = False
    message: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the result as JSON-compatible data."""
        value = self.result.model_dump(mode="json") if isinstance(self.result, BaseModel) else self.result
        return {str(key): part for key, part in value.items()}


def run_command(
    body: Callable[[Reporter], Outcome],
    *,
    json_output: bool = False,
    quiet: bool = False,
    log_format: LogFormat = "text",
    version: bool = False,
) -> int:
    """Runs a command, prints its result or its error, and returns the exit code.

    On SIGTERM, the process ends within LEAVE_SECONDS.

    Args:
        body: The command. It gets the Reporter to use, and may raise FerryError.
        json_output: Print one JSON object, with `seconds` of wall time and `peak_bytes` of resident memory added.
        quiet: No progress and no messages.
        log_format: Format of the messages.
        version: Ignored: `--version` ends the command earlier.

    Returns:
        0; 1 if a check failed; 130 after an interrupt; else the error's exit code.
    """
    termination = _Termination(json_output)
    signal.signal(signal.SIGTERM, termination)
    ends_process_by(lambda error: _leave_now(error, json_output))
    reporter = Reporter("quiet" if quiet else "auto", log_format)
    started = time.monotonic()
    try:
        outcome = body(reporter)
    except KeyboardInterrupt:
        print("ferry: interrupted; finished work is kept", file=sys.stderr)
        return 130
    except FerryError as error:
        return fail(error, json_output)
    except OSError as error:
        return fail(disk_error(error, "a file could not be read or written"), json_output)
    except Exception:
        if termination.error is None:
            raise
        # the interrupted code turned the signal's error into one of its own, such as a failed import
        return fail(termination.error, json_output)
    finally:
        termination.over = True
        ends_process_by(None)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if json_output:
        measured = {"seconds": round(time.monotonic() - started, 3), "peak_bytes": peak_bytes()}
        print(to_json({**measured, **outcome.as_json()}))
    else:
        for part in outcome.text:
            # lines are not wrapped, so that paths can be copied
            print(escaped(part)) if isinstance(part, str) else _console().print(
                part, highlight=False, soft_wrap=isinstance(part, Text)
            )
    if outcome.failed:
        print(f"ferry: {one_line(outcome.message)}", file=sys.stderr)
        return 1
    return 0


def fail(error: FerryError, json_output: bool) -> int:
    """Prints an error, as one line and with `json_output` also as one JSON object, and returns its exit code."""
    answer, line = _said(error)
    if json_output:
        print(answer)
    print(line, file=sys.stderr)
    return error.exit_code


def _said(error: FerryError) -> tuple[str, str]:
    """Returns an error as the object that --json prints, and as one line for standard error."""
    answer = {"error": str(error), "exit_code": error.exit_code, **error.details}
    return json.dumps(answer), f"ferry: {error}"


def _leave_now(error: FerryError, json_output: bool) -> NoReturn:
    """Says what failed and ends the process, from any thread, whatever the others do."""
    answer, line = _said(error)
    if json_output:
        os.write(1, f"{answer}\n".encode())
    os.write(2, f"{line}\n".encode())
    os._exit(error.exit_code)


class _Termination:
    """The handler of SIGTERM: raises Terminated in the main thread, and makes sure that the process ends.

    An exception from a signal handler can be lost in a callback, or arrive just after a lock was taken, so that another
    thread waits for ever. So a second thread ends the process after LEAVE_SECONDS. Nothing is lost then: finished work
    is journaled as it goes.
    """

    def __init__(self, json_output: bool) -> None:
        self._json_output = json_output
        self.error: Terminated | None = None
        self.over = False

    def __call__(self, number: int, frame: object) -> None:
        if self.error is None:
            self.error = Terminated(ENDED)
            # threading.Thread.start takes a lock that the main thread may hold
            _thread.start_new_thread(self._leave_in_time, (self.error,))
        raise self.error

    def _leave_in_time(self, error: Terminated) -> None:
        time.sleep(LEAVE_SECONDS)
        if not self.over:
            _leave_now(error, self._json_output)


def _console() -> PlainConsole:
    """Returns a console for standard output. Without a terminal, lines are not folded."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=1000)
