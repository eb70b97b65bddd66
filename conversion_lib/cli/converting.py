"""Commands that write checkpoints: dequantize, convert, export, finalize, clean."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from conversion_lib.cli.command import command
from conversion_lib.cli.options import (
    OPTIONS,
    TARGET,
    Ckpt,
    Dst,
    DstUrl,
    HfConfig,
    Loader,
    Model,
    Revision,
    Src,
    WrittenBy,
    local_destination,
)
from conversion_lib.errors import BadInput
from conversion_lib.program import Outcome
from conversion_lib.progress import Reporter
from conversion_lib.record import Target
from conversion_lib.runs.options import Options

app = typer.Typer()


@command(app, "dequantize", OPTIONS)
def dequantize(
    reporter: Reporter,
    src: Src,
    dst: Dst,
    options: Options,
    dtype: Annotated[str, typer.Option("--dtype", metavar="bfloat16", help="The dtype to write.")] = "bfloat16",
) -> Outcome:
    """Writes a quantized checkpoint as a bfloat16 one, with all its other files."""
    from conversion_lib.conversions.dequantize import dequantize as dequantize_checkpoint
    from conversion_lib.conversions.opening import opened

    destination = local_destination(dst)
    if dtype != "bfloat16":
        raise BadInput(f"--dtype {dtype}: dequantized weights are bfloat16, whatever they are converted to later")
    source = opened(src, dst, None, memory_budget=options.memory_budget, revision=None, stream=False, reporter=reporter)
    with source as given:
        result = dequantize_checkpoint(given, destination, options=options, reporter=reporter)
    return Outcome(result, [str(result)])


@command(app, "convert", TARGET, OPTIONS)
def convert(
    reporter: Reporter,
    src: Src,
    dst: DstUrl,
    target: Target,
    options: Options,
    model: Model = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part", metavar="I/N", help="Write only share I of N, counted from 0. `ferry finalize` commits."
        ),
    ] = None,
    revision: Revision = None,
    stream_download: Annotated[
        bool,
        typer.Option(
            "--stream-download", help="Download a Hub repository shard by shard, for a disk smaller than the model."
        ),
    ] = False,
    hf_config: HfConfig = None,
    written_by: WrittenBy = None,
    loader: Loader = "safetensors",
) -> Outcome:
    """Converts a Hugging Face checkpoint to a MaxText one at DST/0/items, or a MaxText one to another layout."""
    from conversion_lib.conversions import convert as conversions
    from conversion_lib.conversions.opening import opened
    from conversion_lib.plan.parts import Part

    share = None if part is None else Part.parse(part)
    source = opened(
        src,
        dst,
        share,
        memory_budget=options.memory_budget,
        revision=revision,
        stream=stream_download,
        reporter=reporter,
    )
    with source as given:
        result = conversions.convert(
            given,
            dst,
            target,
            model=model,
            options=replace(options, part=share),
            hf_config=hf_config,
            written_by=written_by,
            loader=loader,
            reporter=reporter,
        )
    return Outcome(result, [str(result)])


@command(app, "export", OPTIONS)
def export(
    reporter: Reporter,
    ckpt: Ckpt,
    dst: Dst,
    options: Options,
    hf_config: HfConfig = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="bfloat16|float32|float16", help="The dtype to write. Default: each tensor's."),
    ] = None,
    model: Model = None,
    written_by: WrittenBy = None,
) -> Outcome:
    """Writes a MaxText checkpoint as a Hugging Face one: safetensors, config, tokenizer."""
    from conversion_lib.conversions.export import export as export_checkpoint

    destination = local_destination(dst)
    result = export_checkpoint(
        ckpt,
        destination,
        hf_config=hf_config,
        dtype=dtype,
        model=model,
        written_by=written_by,
        options=options,
        reporter=reporter,
    )
    return Outcome(result, [str(result)])


@command(app, "finalize")
def finalize(reporter: Reporter, dst: DstUrl) -> Outcome:
    """Merges the parts of a split conversion at DST, and commits."""
    from conversion_lib.conversions.finalize import finalize as finalize_parts

    result = finalize_parts(dst, reporter=reporter)
    return Outcome(result, [str(result)])


@command(app, "clean")
def clean(reporter: Reporter, dst: DstUrl) -> Outcome:
    """Removes what an unfinished run left at DST; a finished checkpoint is not touched."""
    from conversion_lib.runs.trees import begun_stagings
    from conversion_lib.runs.workspace import clean as clean_workspaces

    removed = clean_workspaces(begun_stagings(dst), reporter)
    lines = [f"removed {path}" for path in removed] or [f"nothing unfinished at {dst}"]
    return Outcome({"removed": removed}, list(lines))
