"""What every command of `ferry` shares: options, exit codes, results as text or as one JSON object.

Results go to standard output; progress, messages and errors to standard error.
"""

from __future__ import annotations

import _thread
import functools
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ByteSize, TypeAdapter, ValidationError
from rich.console import Console, RenderableType
from rich.text import Text
from typer.exceptions import TyperException

import conversion_lib
from conversion_lib.errors import BadInput, FerryError, Terminated
from conversion_lib.files import disk_error
from conversion_lib.process import peak_bytes
from conversion_lib.progress import Reporter

LEAVE_SECONDS = 4.5
"""From SIGTERM to the end, at the latest: Airflow kills after five."""
ENDED = "ended by SIGTERM; what was finished is kept, and the same command goes on from there"


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


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ferry {conversion_lib.__version__}")
        raise typer.Exit


VERSION_OPTION = typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
LogFormat = Literal["text", "json"]
_SHARED = {
    "json_output": Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")],
    "quiet": Annotated[bool, typer.Option("--quiet", help="No progress and no messages.")],
    "log_format": Annotated[LogFormat, typer.Option("--log-format", help="How messages look: text or json.")],
    "version": Annotated[bool, VERSION_OPTION],
}
_DEFAULTS: dict[str, Any] = {"json_output": False, "quiet": False, "log_format": "text", "version": False}


@dataclass(frozen=True)
class Group:
    """Options that several commands share and that make one value: `build` has them as its parameters."""

    parameter: str
    build: Callable[..., Any]

    @property
    def options(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.build, eval_str=True).parameters.values())


def command(app: typer.Typer, name: str, *groups: Group) -> Callable[[Callable[..., Outcome]], Callable[..., None]]:
    """Registers a function as `ferry <name>`. It gets a Reporter first, then its own options.

    A parameter that a group names becomes the group's options on the command line.
    """

    def register(body: Callable[..., Outcome]) -> Callable[..., None]:
        @functools.wraps(body)
        def run(**options: Any) -> None:
            shared = {key: options.pop(key) for key in _SHARED}

            def call(reporter: Reporter) -> Outcome:
                for group in groups:
                    values = {option.name: options.pop(option.name) for option in group.options}
                    options[group.parameter] = group.build(**values)
                return body(reporter, **options)

            raise SystemExit(run_command(call, **shared))

        own: list[inspect.Parameter] = []
        for parameter in list(inspect.signature(body, eval_str=True).parameters.values())[1:]:
            group = next((group for group in groups if group.parameter == parameter.name), None)
            own += group.options if group else [parameter]
        extra = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[key], annotation=annotation)
            for key, annotation in _SHARED.items()
        ]
        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([*keyword, *extra])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keyword, *extra]}
        app.command(name)(run)
        return run

    return register


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
        return _fail(error, json_output)
    except OSError as error:
        return _fail(disk_error(error, "a file could not be read or written"), json_output)
    except Exception:
        if termination.error is None:
            raise
        # what the signal interrupted made an error of its own of it: an import that failed, for one
        return _fail(termination.error, json_output)
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


def _fail(error: FerryError, json_output: bool) -> int:
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


def refuse_usage(error: TyperException, json_output: bool) -> int:
    """A command line that is wrong: one line like every other error, and where to read on; returns the exit code."""
    context, message = getattr(error, "ctx", None), getattr(error, "format_message", error.__str__)()
    where = context.command_path if context else "ferry"
    return _fail(BadInput(f"{message.rstrip('.')}; see `{where} --help`"), json_output)


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


def parse_size(text: str, option: str) -> int:
    """`512MiB`, `2GiB` or a number of bytes. Raises BadInput for anything else, naming the option."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise BadInput(f"{option} {text}: no size; write it like 512MiB or 2GiB") from None
