"""`make bench`: what a conversion takes, against the least that it could take and against MaxText.

    python -m tests.benchmarks.bench [--only SECTION ...] [--rounds N] [--tiny] [--cold]

docs/reference/benchmarks.md says what each figure means. Whether a target is met is said, not asserted: figures are the
machine's as well.
"""

from __future__ import annotations

import enum
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.benchmarks.checking import check_figures
from tests.benchmarks.contest import MAXTEXT_PYTHON, ROOT, Contest, convert_figures, uncompressed_figures
from tests.benchmarks.inputs import Input, bf16_input, fp8_input
from tests.benchmarks.limits import memory_figures, startup_figures
from tests.benchmarks.publishing import publish_figures
from tests.benchmarks.restoring import restore_figures
from tests.benchmarks.results import RESULTS, Results

WORK = ROOT / "build" / "bench"
NO_MAXTEXT = "MaxText is left out: {python} is missing; `make parity` makes it"
NO_FP8 = "MaxText 0.2.5 is left out for fp8: it converts neither fp8 weights nor DeepSeek-V3"
OUTPUTS = ("ferry", "maxtext", "floor", "copy", "samples")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Section(enum.StrEnum):
    BF16 = "bf16"
    FP8 = "fp8"
    UNCOMPRESSED = "uncompressed"
    MEMORY = "memory"
    STARTUP = "startup"
    RESTORE = "restore"
    PUBLISH = "publish"
    CHECK = "check"


@app.command()
def main(
    only: Annotated[
        list[Section] | None, typer.Option(help="A section; may be given more than once; default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Figures are medians of so many.")] = 3,
    tiny: Annotated[bool, typer.Option(help="Small inputs: to see that it runs; its figures mean nothing.")] = False,
    cold: Annotated[bool, typer.Option(help="Drop the page cache before each process; takes root.")] = False,
    work: Annotated[Path, typer.Option(help="Where inputs are kept and outputs written: the disk to measure.")] = WORK,
    results: Annotated[Path, typer.Option(help="The file that a line is appended to.")] = RESULTS,
) -> None:
    """Measures conversions and appends a line to the results file."""
    work = work.absolute() / "tiny" if tiny else work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    sections = only or list(Section)
    settings = {"sections": sections, "rounds": rounds, "tiny": tiny, "cache": "cold" if cold else "warm"}
    found = Results("bench", settings)
    for section in sections:
        typer.echo(f"{section}:", err=True)
        _run(section, found, work, rounds, tiny, cold)
    for name in OUTPUTS:
        shutil.rmtree(work / name, ignore_errors=True)
    found.print(Console(width=120))
    found.append(results)


def _run(section: Section, found: Results, work: Path, rounds: int, tiny: bool, cold: bool) -> None:
    """One section's figures, or a remark on why there are none."""
    maxtext = MAXTEXT_PYTHON.exists()

    def contest(wanted: Input) -> Contest:
        prepared = Contest(wanted, work, rounds, cold)
        prepared.prepare()
        return prepared

    bf16, fp8 = bf16_input(tiny), fp8_input(tiny)
    if not maxtext and section in (Section.BF16, Section.RESTORE):
        found.remarks.append(f"{section}: " + NO_MAXTEXT.format(python=MAXTEXT_PYTHON.relative_to(ROOT)))
    match section:
        case Section.BF16:
            found.add(_title(bf16), convert_figures(contest(bf16), maxtext=maxtext))
        case Section.FP8:
            found.add(_title(fp8), convert_figures(contest(fp8), maxtext=False))
            found.remarks.append(NO_FP8)
        case Section.UNCOMPRESSED:
            found.add(f"{_title(bf16)}, --compression none", uncompressed_figures(contest(bf16)))
            found.add(f"{_title(fp8)}, --compression none", uncompressed_figures(contest(fp8)))
        case Section.MEMORY:
            found.add("memory when the layers are four times as many", memory_figures(work, rounds, tiny=tiny))
        case Section.STARTUP:
            found.add("start-up, DeepSeek-V3's true index", startup_figures(work, rounds))
        case Section.RESTORE:
            if maxtext:
                found.add(f"{_title(bf16)}: restored over 16 devices", restore_figures(contest(bf16)))
        case Section.PUBLISH | Section.CHECK:
            measured = publish_figures if section is Section.PUBLISH else check_figures
            for title, figures in measured(work, rounds, tiny=tiny, cold=cold).items():
                found.add(title, figures)


def _title(wanted: Input) -> str:
    return f"{wanted.name} ({wanted.nbytes / 1e9:.2f} GB)"


if __name__ == "__main__":
    app()
