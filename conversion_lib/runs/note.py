"""The unfinished run at a destination, and which other runs may continue it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from conversion_lib.errors import BadInput
from conversion_lib.plan.parts import Part
from conversion_lib.runs.differences import refuse_difference

RUN_NAME = "run.json"
PLAN_NAME = "plan.json"
"""In the work directory of a conversion to MaxText: the plan, for `finalize`, which may not have the source."""


class Run(BaseModel):
    """`run.json`: what an unfinished run writes, and how it is split. All of its parts follow it."""

    model_config = ConfigDict(frozen=True)

    identity: dict[str, str]
    chunk_limit: Annotated[int, Field(ge=1)]
    """Largest size of a chunk in bytes. It depends on the memory budget of the part that began the run; the others must
    use the same."""
    chunks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """How many chunks each part writes, one number per part."""

    def __str__(self) -> str:
        return "of the whole" if len(self.chunks) == 1 else f"in {len(self.chunks)} parts"


def joined(held: Run | None, run: Run, where: str, *, part: Part | None, overwrite: bool) -> Run | None:
    """Decides whether a run continues the unfinished run at its destination.

    Args:
        held: The unfinished run. None: there is none.
        run: The run that starts.
        where: The work directory, for error messages.
        part: The part that starts. None: the whole.
        overwrite: Whether to replace an unfinished run. A part continues a run of its own kind all the same.

    Returns:
        `held` to continue it; None to start over.

    Raises:
        BadInput: `held` is another run and may not be overwritten.
    """
    if held is None or (overwrite and part is None):
        return None
    same = held.identity == run.identity and len(held.chunks) == len(run.chunks)
    if same or overwrite:
        return held if same else None
    refuse_difference(held.identity, run.identity, f"{where} holds an unfinished run")
    raise BadInput(
        f"{where} holds an unfinished run {held}, and this one is {run}: give the same --part I/N, or --overwrite to"
        " start over"
    )
