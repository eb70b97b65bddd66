"""Commands that only look: models, plan, inspect, compare."""

from __future__ import annotations

from typing import Annotated

import typer

from conversion_lib.cli.command import command
from conversion_lib.cli.options import PLAN_OPTIONS, TARGET, HfConfig, Loader, Model, Revision, Src, WrittenBy
from conversion_lib.program import Outcome
from conversion_lib.progress import Reporter
from conversion_lib.record import Target
from conversion_lib.runs.options import Options

app = typer.Typer()


@command(app, "models")
def models(reporter: Reporter) -> Outcome:
    """Lists families and model names, with what is verified for each."""
    from conversion_lib.cli import show

    return Outcome(show.models(), show.models_text())


@command(app, "plan", TARGET, PLAN_OPTIONS)
def plan(
    reporter: Reporter,
    src: Src,
    target: Target,
    options: Options,
    model: Model = None,
    revision: Revision = None,
    hf_config: HfConfig = None,
    written_by: WrittenBy = None,
    loader: Loader = "safetensors",
) -> Outcome:
    """Shows what would be written: arrays, bytes, peak memory, disk, warnings. For a Hub id, fetches only headers."""
    from conversion_lib.cli import show
    from conversion_lib.conversions.convert import prepare
    from conversion_lib.conversions.opening import headers

    with headers(src, revision, reporter) as given:
        job = prepare(
            given,
            target,
            model=model,
            memory_budget=options.memory_budget,
            hf_config=hf_config,
            written_by=written_by,
            loader=loader,
        )
    summary = show.plan_summary(job, options.memory_budget, options.threads)
    return Outcome(summary, show.plan_text(job, summary))


@command(app, "inspect")
def inspect(
    reporter: Reporter,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint of either kind; also gs://.")],
) -> Outcome:
    """Shows names, shapes, dtypes, chunks and metadata of a checkpoint."""
    from conversion_lib.cli import show

    data = show.inspection(path)
    return Outcome(data, show.inspection_text(data))


@command(app, "compare")
def compare(
    reporter: Reporter,
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint; also gs://.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same kind.")],
) -> Outcome:
    """Compares two checkpoints of the same kind, leaf by leaf, bit for bit."""
    from conversion_lib.conversions.compare import compare as compare_checkpoints

    result = compare_checkpoints(a, b, reporter=reporter)
    lines = [f"{found.path}: {found.what} {found.detail}".rstrip() for found in result.differences]
    text = [*lines, f"{result.leaves - len(lines)} of {result.leaves} leaves are the same bit for bit"]
    return Outcome(result, list(text), failed=not result.same, message=f"{len(lines)} of {result.leaves} leaves differ")
