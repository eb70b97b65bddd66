"""Options of the command line made from the definitions of what they set: fields of Target and of the run's Options."""

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
"""Fields of Target that are written like 64MiB."""


def option(name: str, annotation: Any, default: Any, help: str, **settings: Any) -> inspect.Parameter:
    """One option, as a parameter of a command: `--name`, or `--name/--no-name` where it is on by default."""
    words = f"{option_name(name)}/{option_name(f'no_{name}')}" if default is True else option_name(name)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, typer.Option(words, help=help, **settings)],
    )


def target_option(field: str) -> inspect.Parameter:
    """The option of a field of Target. Named values stay text here: `Target.parse` says what is wrong with one."""
    info = Target.model_fields[field]
    description = str(info.description)
    if field in SIZES:
        return option(field, str, size_text(info.default), description)
    if values := Target.values_of(field):
        return option(field, str, info.default, description, metavar="|".join(values))
    return option(field, info.annotation, info.default, description)


def run_options(*names: str) -> tuple[inspect.Parameter, ...]:
    """The options of Options' fields that have a description; `names`: of these alone."""
    types = get_type_hints(Options, localns={"Part": Any})  # which is imported for type checkers alone
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
    """The Options that the command line gives. Raises BadInput for what is not a size."""
    sizes = {field.name for field in dataclasses.fields(Options) if field.metadata.get(BYTES)}
    parsed = {name: parse_size(value, option_name(name)) for name, value in values.items() if name in sizes}
    return Options(**{**values, **parsed})


def target_of(values: Mapping[str, Any]) -> Target:
    """The Target that the command line gives. Raises BadInput for a value that none has, naming the option."""
    sizes = {name: parse_size(values[name], option_name(name)) for name in SIZES if name in values}
    return Target.parse({**values, **sizes}, lambda field: f"{option_name(field)} ")


def size_text(size: Any) -> str:
    """A number of bytes as `parse_size` takes it: `64MiB`."""
    units = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, ""))
    return next(f"{size // unit}{name}" for unit, name in units if size % unit == 0)
