"""The command line of the steps, with the same options, exit codes and results as `ferry`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conversion_lib.cli.command import command
from conversion_lib.cli.options import TARGET, Model
from conversion_lib.program import Outcome
from conversion_lib.progress import Reporter
from conversion_lib.record import Target
from ferry_airflow.choices import DEQUANTIZE_MODES, OVERWRITE, POLICIES, STAGED

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@command(app, "resolve", TARGET)
def resolve(
    reporter: Reporter,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, or absolute path of a directory.")],
    target: Target,
    destination: Annotated[str, typer.Option("--destination", help="gs://bucket/prefix or an absolute directory.")],
    run: Annotated[str, typer.Option("--run", help="Id of the run that uses it.")],
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit.")] = "main",
    dequantize: Annotated[str, typer.Option("--dequantize", metavar="|".join(DEQUANTIZE_MODES))] = STAGED,
    overwrite: Annotated[str | None, typer.Option("--overwrite", metavar="|".join(OVERWRITE))] = None,
    model: Model = None,
) -> Outcome:
    """Pins the commit, plans, and says what the run needs."""
    from ferry_airflow.steps.resolve import Request
    from ferry_airflow.steps.resolve import resolve as resolve_source

    request = Request(
        repo, revision, target, model, destination, staged=dequantize == STAGED, run=run, overwrite=overwrite
    )
    return Outcome(resolve_source(request, reporter))


@command(app, "clean-up")
def clean_up(
    reporter: Reporter,
    work_dir: Annotated[Path, typer.Argument(metavar="WORK_DIR", help="Working directory of the run's source.")],
    run: Annotated[str, typer.Option("--run", help="Id of the run that has ended.")],
    target: Annotated[str, typer.Option("--target", help="Name of the target that the run wrote.")],
    keep: Annotated[str, typer.Option("--keep", metavar="|".join(POLICIES))],
    succeeded: Annotated[bool, typer.Option("--succeeded/--failed", help="How the run ended.")],
) -> Outcome:
    """Removes a run's files, as --keep says."""
    from ferry_airflow.steps.files import clean_up as clean_up_files

    return Outcome(clean_up_files(work_dir, run, target, keep=keep, succeeded=succeeded, reporter=reporter))


@command(app, "upload")
def upload(
    reporter: Reporter,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory with a Hugging Face checkpoint.")],
    destination: Annotated[str, typer.Argument(metavar="URL", help="gs://bucket/prefix or hf://org/name.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Visibility of a new repository.")] = True,
    message: Annotated[str, typer.Option("--message", help="Commit message on the Hub.")] = "Export from MaxText",
) -> Outcome:
    """Uploads an exported checkpoint to Cloud Storage or the Hub."""
    from conversion_lib.publish.upload import upload as upload_checkpoint

    return Outcome(upload_checkpoint(source, destination, private=private, message=message, reporter=reporter))


if __name__ == "__main__":
    app(prog_name="python -m ferry_airflow.steps")
