"""Options and arguments that several commands share, and the values made from them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter

from conversion_lib.cli.command import Group
from conversion_lib.cli.derived import option, options_of, run_options, target_of, target_option
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
from conversion_lib.storage.locations import local_path

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory or gs:// with safetensors, a Hub id such as Qwen/Qwen3-0.6B, or a CKPT.",
    ),
]
Dst = Annotated[str, typer.Argument(metavar="DST", help="The directory to write.")]
DstUrl = Annotated[str, typer.Argument(metavar="DST", help="The directory to write, or gs://bucket/prefix.")]
Ckpt = Annotated[
    str, typer.Argument(metavar="CKPT", help="A MaxText checkpoint: DST, DST/0 or DST/0/items; also gs://.")
]
Model = Annotated[
    str | None, typer.Option("--model", help="A name from `ferry models`. Default: the family that config.json names.")
]
HfConfig = Annotated[
    Path | None,
    typer.Option("--hf-config", help="Directory with config.json and tokenizer. Default: hf/ beside the checkpoint."),
]
WrittenBy = Annotated[
    str | None,
    typer.Option(
        "--written-by",
        metavar="|".join(Target.values_of("maxtext")),
        help="MaxText release that wrote the checkpoint, if it does not say.",
    ),
]
Loader = Annotated[
    str,
    typer.Option(
        "--loader", metavar="safetensors|transformers", help="transformers loads the whole model into memory."
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repository. Default: main.")
]

PATHWAYS = option("pathways", bool, False, "For Pathways: neither OCDBT nor zarr3.")
STORAGE = ("ocdbt", "zarr3")


def _target_options() -> tuple[inspect.Parameter, ...]:
    """Returns options for every field except the shards, which only MaxText's own command line has.

    `--pathways` comes after the options that it turns off.
    """
    options = [target_option(field) for field in Target.model_fields if field != "shards"]
    behind = 1 + max(index for index, one in enumerate(options) if one.name in STORAGE)
    return (*options[:behind], PATHWAYS, *options[behind:])


def build_target(*, pathways: bool, **values: Any) -> Target:
    """Builds the Target from the options.

    Raises:
        BadInput: A value is not allowed. The message names the option.
    """
    if pathways:
        values |= dict.fromkeys(STORAGE, False)
    return target_of(values)


def build_options(**values: Any) -> Options:
    """Builds the run's Options from the options that a command has.

    Raises:
        BadInput: A value is not a size.
    """
    return options_of(values)


TARGET = Group("target", _target_options(), build_target)
OPTIONS = Group("options", run_options(), build_options)
PLAN_OPTIONS = Group("options", run_options("memory_budget", "threads"), build_options)
"""For a command that writes nothing."""


def local_destination(dst: str) -> Path:
    """Returns DST as a directory.

    Raises:
        BadInput: DST is a URL.
    """
    return local_path(dst, "a directory; only `ferry convert` and `ferry publish` write to gs://")


def plain(result: Any) -> dict[str, Any]:
    """Returns a dataclass or model as JSON-compatible data."""
    data = TypeAdapter(type(result)).dump_python(result, mode="json")
    return {str(key): value for key, value in data.items()}
