"""The entry point of `ferry`. Each command is a few lines that call the library; `command.py` has what they share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from conversion_lib.cli import checking, converting, looking, moving
from conversion_lib.cli.command import VERSION_OPTION, command, refuse_usage
from conversion_lib.core.process import collect_rarely, leave, reuse_freed_memory
from conversion_lib.program import Outcome
from conversion_lib.progress import Reporter

app = typer.Typer(
    name="ferry",
    help="Converts checkpoints between Hugging Face (safetensors) and MaxText (Orbax).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (looking, converting, checking, moving):
    app.add_typer(commands.app)


@app.callback()
def ferry(version: Annotated[bool, VERSION_OPTION] = False) -> None:
    pass


@command(app, "demo")
def demo(
    reporter: Reporter,
    work_dir: Annotated[
        Path, typer.Option("--work-dir", help="Working directory of the demo. It is emptied first.")
    ] = Path(".demo"),
) -> Outcome:
    """Runs the whole DAG on a small fp8 DeepSeek-V3, with Airflow as a subprocess."""
    from conversion_lib.demo.run import run_demo, summary

    result = run_demo(work_dir, reporter)
    return Outcome(result, summary(result))


def main() -> None:
    """Runs `ferry` with the process's arguments, and exits with the command's exit code."""
    reuse_freed_memory()
    collect_rarely()
    if len(sys.argv) == 1:
        app(prog_name="ferry")  # prints its help
    try:
        code = app(prog_name="ferry", standalone_mode=False)
    except TyperException as error:
        raise SystemExit(refuse_usage(error, "--json" in sys.argv)) from None
    leave(code if isinstance(code, int) else 0)
