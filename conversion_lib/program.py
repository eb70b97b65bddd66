"""A piece of work as a process: signals, exit codes, its result as text or as one JSON object.

What `ferry` shares with the drop-ins and with conversions on the fly. Results go to standard output; progress, messages
and errors to standard error.
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
from typing import Any, Literal

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.text import Text

from conversion_lib.core.process import peak_bytes
from conversion_lib.errors import FerryError, Terminated
from conversion_lib.progress import Reporter
from conversion_lib.storage.files import disk_error

LogFormat = Literal["text", "json"]
LEAVE_SECONDS = 4.5
"""From SIGTERM to the end, at the latest: Airflow kills after five."""
ENDED = "ended by SIGTERM; what was finished is kept, and the same command resumes from there"


@dataclass
class Outcome:
    """What a command has to say. `failed`: a check ran and failed, exit 1, with `message` on standard error."""

    result: BaseModel | dict[str, Any]
    text: list[RenderableType] = field(default_factory=list)
    failed: bool = False
    message: str = ""

    def as_json(self) -> dict[str, Any]:
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
    """Runs a command and returns its exit code."""
    termination = _Termination(json_output)
    signal.signal(signal.SIGTERM, termination)
    reporter = Reporter("quiet" if quiet else "auto", log_format)
    started = time.monotonic()
    try:
        outcome = body(reporter)
    except KeyboardInterrupt:
        print("ferry: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except FerryError as error:
        return fail(error, json_output)
    except OSError as error:
        return fail(disk_error(error, "a file could not be read or written"), json_output)
    except Exception:
        if termination.error is None:
            raise
        # what the signal interrupted raised it as its own error, such as a failed import
        return fail(termination.error, json_output)
    finally:
        termination.over = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if json_output:
        measured = {"seconds": round(time.monotonic() - started, 3), "peak_bytes": peak_bytes()}
        print(json.dumps({**measured, **outcome.as_json()}))
    else:
        for part in outcome.text:
            # lines are not wrapped: paths in them are for copying
            print(part) if isinstance(part, str) else _console().print(
                part, highlight=False, soft_wrap=isinstance(part, Text)
            )
    if outcome.failed:
        print(f"ferry: {outcome.message}", file=sys.stderr)
        return 1
    return 0


def fail(error: FerryError, json_output: bool) -> int:
    """Says what failed; returns the exit code."""
    answer, line = _said(error)
    if json_output:
        print(answer)
    print(line, file=sys.stderr)
    return error.exit_code


def _said(error: FerryError) -> tuple[str, str]:
    """An error as the object that --json prints, and as one line for standard error."""
    message = " ".join(str(error).split())
    return json.dumps({"error": message, "exit_code": error.exit_code}), f"ferry: {message}"


class _Termination:
    """What SIGTERM does: raises Terminated wherever the main thread is, and sees to it that the process ends.

    An exception that comes out of nowhere can be lost, in a callback, or come just as a lock was taken, for which
    another thread then waits for ever. What is finished is journaled at any time, so that leaving is as good.
    """

    def __init__(self, json_output: bool) -> None:
        self._json_output = json_output
        self.error: Terminated | None = None
        self.over = False

    def __call__(self, number: int, frame: object) -> None:
        if self.error is None:
            self.error = Terminated(ENDED)
            # threading's own takes a lock that the main thread may hold
            _thread.start_new_thread(self._leave_in_time, (self.error,))
        raise self.error

    def _leave_in_time(self, error: Terminated) -> None:
        time.sleep(LEAVE_SECONDS)
        if self.over:
            return
        answer, line = _said(error)
        if self._json_output:
            os.write(1, f"{answer}\n".encode())
        os.write(2, f"{line}\n".encode())
        os._exit(error.exit_code)


def _console() -> Console:
    """Standard output; no line is folded where there is no terminal to fit."""
    console = Console()
    return console if console.is_terminal else Console(width=1000)
