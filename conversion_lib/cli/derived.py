"""Options of the command line, derived from the fields that they set: those of Target and of the run's Options."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

import typer

from conversion_lib.cli.command import parse_size
from conversion_lib.record import Target, option_name
from conversion_lib.runs.options import BYTES, HELP, LEAST, Options

SIZES = ("chunk_bytes",)
"""Fields of Target that are given as sizes, such as 64MiB."""


def option(name: str, annotation: Any, default: Any, help: str, **settings: Any) -> inspect.Parameter:
    """Returns a command's parameter for one option: `--name`, or `--name/--no-name` if it is on by default.

    Args:
        name: The parameter's name, with underscores.
        annotation: The option's type.
        default: The option's default. True makes a pair of flags.
        help: The text in --help.
        **settings: Passed on to `typer.Option`.
    """
    words = f"{option_name(name)}/{option_name(f'no_{name}')}" if default is True else option_name(name)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, typer.Option(words, help=help, **settings)],
    )


def target_option(field: str) -> inspect.Parameter:
    """Returns the option for a field of Target. A Literal field is plain text here: `Target.parse` checks its value."""
    info = Target.model_fields[field]
    description = str(info.description)
    if field in SIZES:
        return option(field, str, size_text(info.default), description)
    if values := Target.values_of(field):
        return option(field, str, info.default, description, metavar="|".join(values))
    return option(field, info.annotation, info.default, description)


def run_options(*names: str) -> tuple[inspect.Parameter, ...]:
    """Returns options for the fields of Options that have a description; with `names`, only for these."""
    types = get_type_hints(Options, localns={"Part": Any})  # Part is imported only for type checkers
    found = []
    for field in dataclasses.fields(Options):
        if HELP not in field.metadata or (names and field.name not in names):
            continue
        if field.metadata.get(BYTES):
            found.append(option(field.name, str, size_text(field.default), field.metadata[HELP]))
        else:
            least = {"min": field.metadata[LEAST]} if LEAST in field.metadata else {}
            found.append(option(field.name, types[field.name], field.default, field.metadata[HELP], **least))
    return tuple(found)


def options_of(values: Mapping[str, Any]) -> Options:
    """Builds the Options from the values on the command line.

    Raises:
        BadInput: A value is not a size.
    """
    sizes = {field.name for field in dataclasses.fields(Options) if field.metadata.get(BYTES)}
    parsed = {name: parse_size(value, option_name(name)) for name, value in values.items() if name in sizes}
    return Options(**{**values, **parsed})


def target_of(values: Mapping[str, Any]) -> Target:
    """Builds the Target from the values on the command line.

    Raises:
        BadInput: A value is not allowed. The message names the option.
    """
    sizes = {name: parse_size(values[name], option_name(name)) for name in SIZES if name in values}
    return Target.parse({**values, **sizes}, lambda field: f"{option_name(field)} ")


def size_text(size: Any) -> str:
    """Formats a number of bytes as `parse_size` reads it: 67108864 -> `64MiB`."""
    units = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, ""))
    return next(f"{size // unit}{name}" for unit, name in units if size % unit == 0)
