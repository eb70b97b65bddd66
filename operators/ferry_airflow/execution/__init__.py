"""How stages run: one module for each execution mode, chosen by configuration when a task starts.

`FERRY_EXECUTION`, a variable in the workers' environment, names a YAML file::

    default: kubernetes        # the mode of every stage that `stages` does not name; `local` without a file
    stages:
      resolve: local
    options:                   # added to a stage's command line, in every mode
      convert: [--memory-budget, 8GiB]
    kubernetes: {...}          # the settings of that mode: see its module

A mode is a module of this package with a function `execution_mode(stage, options)`. To add a mode, add a module.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib.core.documents import parse_yaml, read_limited
from conversion_lib.errors import BadInput, problem_of
from conversion_lib.limits import YAML_BYTES
from ferry_airflow.execution.base import ExecutionMode

VARIABLE = "FERRY_EXECUTION"


class ExecutionSettings(BaseModel):
    """The file that `FERRY_EXECUTION` names. Any other key is the name of a mode, with its settings.

    Attributes:
        default: The mode of every stage that `stages` does not name.
        stages: Modes by stage.
        options: Arguments to add to a command line, by stage.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    default: str = "local"
    stages: dict[str, str] = {}
    options: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Configured:
    """How a stage runs.

    Attributes:
        mode: Runs the stage's command.
        options: Arguments that are added to the command line.
    """

    mode: ExecutionMode
    options: tuple[str, ...] = ()


def configured(stage: str) -> Configured:
    """Reads how a stage runs from the file that `FERRY_EXECUTION` names.

    Raises:
        BadInput: The file cannot be read or is wrong. The message names it.
    """
    path = os.environ.get(VARIABLE)
    settings = _read(Path(path)) if path else ExecutionSettings()
    name = settings.stages.get(stage, settings.default)
    options = (settings.model_extra or {}).get(name) or {}
    try:
        module = import_module(f"ferry_airflow.execution.{name}")
    except ImportError as error:
        raise BadInput(f"{path}: the execution mode {name} of the stage {stage} cannot be loaded: {error}") from None
    try:
        made: ExecutionMode = module.execution_mode(stage, options)
    except (ValidationError, AttributeError) as error:
        raise BadInput(f"{path}: {name}: {one_line(error)}") from None
    return Configured(made, tuple(settings.options.get(stage, ())))


def _read(path: Path) -> ExecutionSettings:
    try:
        return ExecutionSettings.model_validate(parse_yaml(read_limited(path, YAML_BYTES), path) or {})
    except OSError as error:
        raise BadInput(f"{VARIABLE} names {path}, which cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise BadInput(f"{path}: {one_line(error)}") from None


def one_line(error: Any) -> str:
    """Returns an error in one line; for a validation error the first problem and its place."""
    if isinstance(error, ValidationError):
        return problem_of(error)
    return " ".join(str(error).split())
