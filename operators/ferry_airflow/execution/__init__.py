"""How stages run: one module for each execution mode, chosen by configuration when a task starts.

`FERRY_EXECUTION`, a variable in the workers' environment, names a YAML file::

    default: kubernetes        # the mode of every stage that is not named below; `local` without a file
    stages:
      resolve: local
    options:                   # added to a stage's command line, wherever it runs
      convert: [--memory-budget, 8GiB]
    kubernetes: {...}          # the settings of the mode of that name: see its module

A mode is a module of this package with a function `execution_mode(stage, options)`; a third one is one more module.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib.errors import BadInput, problem_of
from ferry_airflow.execution.base import ExecutionMode

VARIABLE = "FERRY_EXECUTION"


class ExecutionSettings(BaseModel):
    """The file that `FERRY_EXECUTION` names. Keys beside these are modes, with the settings of each."""

    model_config = ConfigDict(extra="allow", frozen=True)

    default: str = "local"
    stages: dict[str, str] = {}
    options: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Configured:
    """How a stage runs, and what is added to its command line."""

    mode: ExecutionMode
    options: tuple[str, ...] = ()


def configured(stage: str) -> Configured:
    """What the configuration says of a stage. Raises BadInput, naming the file, where it is wrong."""
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
        return ExecutionSettings.model_validate(yaml.safe_load(path.read_text()) or {})
    except OSError as error:
        raise BadInput(f"{VARIABLE} names {path}, which cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise BadInput(f"{path}: {one_line(error)}") from None


def one_line(error: Any) -> str:
    """What is wrong, in one line; of a validation error the first thing, and where it is."""
    if isinstance(error, ValidationError):
        return problem_of(error)
    return " ".join(str(error).split())
