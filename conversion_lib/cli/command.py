"""What every command of `ferry` shares: options, exit codes, results as text or as one JSON object.

Results go to standard output; progress, messages and errors go to standard error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from typer.exceptions import TyperException

import conversion_lib
from conversion_lib.errors import BadInput
from conversion_lib.program import LogFormat, Outcome, fail, run_command
from conversion_lib.progress import Reporter


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ferry {conversion_lib.__version__}")
        raise typer.Exit


VERSION_OPTION = typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
_SHARED = {
    "json_output": Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")],
    "quiet": Annotated[bool, typer.Option("--quiet", help="No progress and no messages.")],
    "log_format": Annotated[LogFormat, typer.Option("--log-format", help="Format of messages: text or json.")],
    "version": Annotated[bool, VERSION_OPTION],
}
_DEFAULTS: dict[str, Any] = {"json_output": False, "quiet": False, "log_format": "text", "version": False}


@dataclass(frozen=True)
class Group:
    """Options that several commands share and that together make one value.

    Attributes:
        parameter: The parameter of the command that gets the value.
        options: The options, in the order of the help.
        build: Makes the value from the options, which are passed by keyword.
    """

    parameter: str
    options: tuple[inspect.Parameter, ...]
    build: Callable[..., Any]


def command(app: typer.Typer, name: str, *groups: Group) -> Callable[[Callable[..., Outcome]], Callable[..., None]]:
    """Registers a function as `ferry <name>`; its docstring is the help.

    Args:
        app: Where the command is registered.
        name: The command's name.
        *groups: A parameter that a group names becomes the group's options on the command line.

    Returns:
        A decorator. The function gets a Reporter first, then its options by keyword. The process exits with the
        command's exit code.
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
            own += [*group.options] if group else [parameter]
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


def refuse_usage(error: TyperException, json_output: bool) -> int:
    """Reports a wrong command line as one line, with a pointer to --help, and returns the exit code."""
    context, message = getattr(error, "ctx", None), getattr(error, "format_message", error.__str__)()
    where = context.command_path if context else "ferry"
    return fail(BadInput(f"{message.rstrip('.')}; see `{where} --help`"), json_output)


def parse_size(text: str, option: str) -> int:
    """Parses `512MiB`, `2GiB` or a number of bytes.

    Args:
        text: The size.
        option: The option's name, for the error message.

    Returns:
        Bytes.

    Raises:
        BadInput: The text is not a size.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise BadInput(f"{option} {text}: not a size; write it like 512MiB or 2GiB") from None
