"""The command that decides whether a checkpoint may be published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from conversion_lib.cli.command import command, parse_size
from conversion_lib.cli.options import Ckpt
from conversion_lib.core.process import return_freed_memory
from conversion_lib.program import Outcome
from conversion_lib.progress import Reporter
from conversion_lib.record import MAX_MODEL_KL, MAX_MODEL_KL_HELP

app = typer.Typer()


@command(app, "check")
def check(
    reporter: Reporter,
    ckpt: Ckpt,
    reference: Annotated[
        Path,
        typer.Option("--reference", help="The Hugging Face checkpoint, or golden logits (.npz, .jsonl, .pickle)."),
    ],
    report: Annotated[
        Path | None, typer.Option("--report", help="Directory for the report. Default: CKPT's report/.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="Maximum KL divergence of a token for the check to pass.")
    ] = None,
    max_model_kl: Annotated[float, typer.Option("--max-model-kl", min=0, help=MAX_MODEL_KL_HELP)] = MAX_MODEL_KL,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of the longest prompt, in tokens.")] = 512,
    memory_budget: Annotated[
        str, typer.Option("--memory-budget", help="Maximum memory to use, such as 6GiB.")
    ] = "6GiB",
    save_golden: Annotated[
        Path | None, typer.Option("--save-golden", help="Save the reference's logits here (.npz).")
    ] = None,
    engine: Annotated[
        Literal["ferry", "maxtext"],
        typer.Option("--engine", help="What runs the checkpoint: Ferry's forward pass, or MaxText itself."),
    ] = "ferry",
    maxtext_python: Annotated[
        Path | None,
        typer.Option("--maxtext-python", help="For --engine maxtext: a Python interpreter that has MaxText."),
    ] = None,
) -> Outcome:
    """Compares the logits of a MaxText checkpoint with the original's."""
    from conversion_lib.models.transformers_library import require_check_libraries

    require_check_libraries()
    from conversion_lib.logits.check import Options, run_check
    from conversion_lib.logits.verdict.report import summary

    return_freed_memory()
    options = Options(
        max_kl=max_kl,
        max_model_kl=max_model_kl,
        tokens=tokens,
        save_golden=save_golden,
        memory_budget=parse_size(memory_budget, "--memory-budget"),
        engine=engine,
        maxtext_python=maxtext_python,
    )
    result = run_check(ckpt, reference, report_dir=report, options=options, reporter=reporter)
    failed = result.verdict != "pass"
    return Outcome(result, list(summary(result)), failed=failed, message=f"check failed: {result.reason}")
