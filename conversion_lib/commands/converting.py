"""Commands that write checkpoints: dequantize, convert, finalize, clean."""

from __future__ import annotations

from typing import Annotated

import typer

from conversion_lib.command import Outcome, command, parse_size
from conversion_lib.commands.options import (
    TARGET,
    Budget,
    Dst,
    Model,
    Overwrite,
    SkipDisk,
    Src,
    Threads,
    done_line,
    local_directory,
)
from conversion_lib.errors import BadInput
from conversion_lib.progress import Reporter
from conversion_lib.record import Target

app = typer.Typer()


@command(app, "dequantize")
def dequantize(
    reporter: Reporter,
    src: Src,
    dst: Dst,
    dtype: Annotated[str, typer.Option("--dtype", metavar="bfloat16", help="The dtype to write.")] = "bfloat16",
    memory_budget: Budget = "2GiB",
    threads: Threads = None,
    overwrite: Overwrite = False,
    skip_disk_check: SkipDisk = False,
) -> Outcome:
    """Writes an fp8 checkpoint as a bfloat16 one, with all that belongs to it."""
    from conversion_lib import convert as conversions

    if dtype != "bfloat16":
        raise BadInput(f"--dtype {dtype}: dequantized weights are bfloat16, whatever they are converted to later")
    options = conversions.Options(parse_size(memory_budget, "--memory-budget"), threads, overwrite, skip_disk_check)
    result = conversions.dequantize(local_directory(src, reporter), dst, options=options, reporter=reporter)
    return Outcome(result, [done_line(result)])


@command(app, "convert", TARGET)
def convert(
    reporter: Reporter,
    src: Src,
    dst: Dst,
    target: Target,
    model: Model = None,
    memory_budget: Budget = "2GiB",
    threads: Threads = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Only the share I of N, counted from 0; `ferry finalize` commits."),
    ] = None,
    overwrite: Overwrite = False,
    skip_disk_check: SkipDisk = False,
) -> Outcome:
    """Converts a Hugging Face checkpoint to a MaxText one at DST/0/items."""
    from conversion_lib import convert as conversions
    from conversion_lib.parts import Part

    share = None if part is None else Part.parse(part)
    budget = parse_size(memory_budget, "--memory-budget")
    options = conversions.Options(budget, threads, overwrite, skip_disk_check, share)
    result = conversions.convert(
        local_directory(src, reporter), dst, target, model=model, options=options, reporter=reporter
    )
    return Outcome(result, [done_line(result)])


@command(app, "finalize")
def finalize(reporter: Reporter, dst: Dst) -> Outcome:
    """Merges the parts of a split conversion at DST, and commits."""
    from conversion_lib.finalize import finalize as finalize_parts

    result = finalize_parts(dst, reporter=reporter)
    return Outcome(result, [done_line(result)])


@command(app, "clean")
def clean(reporter: Reporter, dst: Dst) -> Outcome:
    """Removes what an unfinished run left at DST; a finished checkpoint is not touched."""
    from conversion_lib.convert import hf_layout, maxtext_layout
    from conversion_lib.workspace import clean as clean_workspaces

    removed = clean_workspaces([maxtext_layout(dst), hf_layout(dst)])
    lines = [f"removed {path}" for path in removed] or [f"nothing unfinished at {dst}"]
    return Outcome({"removed": [str(path) for path in removed]}, list(lines))
