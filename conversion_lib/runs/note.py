"""The unfinished run that a destination holds, a directory or a bucket, and which other runs may go on with it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from conversion_lib.errors import BadInput
from conversion_lib.plan.parts import Part
from conversion_lib.runs.differences import refuse_difference

RUN_NAME = "run.json"
PLAN_NAME = "plan.json"
"""In the work directory of a conversion to MaxText: the plan, for `finalize`, which may not see the source."""


class Run(BaseModel):
    """`run.json`: what an unfinished run writes and how it is shared out. All of its parts keep to it."""

    model_config = ConfigDict(frozen=True)

    identity: dict[str, str]
    chunk_limit: int
    """Bytes of a chunk at most. It depends on the memory of whoever began; the others must cut chunks alike."""
    chunks: tuple[int, ...]
    """How many chunks each part has to write: as many numbers as there are parts."""

    def __str__(self) -> str:
        return "of the whole" if len(self.chunks) == 1 else f"in {len(self.chunks)} parts"


def joined(held: Run | None, run: Run, where: str, *, part: Part | None, overwrite: bool) -> Run | None:
    """The unfinished run `held` where `run`, or its part, is to go on with it; None where one begins anew.

    Raises BadInput where it is another run, and may not be overwritten.
    """
    if held is None or (overwrite and part is None):
        return None
    same = held.identity == run.identity and len(held.chunks) == len(run.chunks)
    if same or overwrite:
        return held if same else None
    refuse_difference(held.identity, run.identity, f"{where} holds an unfinished run")
    raise BadInput(
        f"{where} holds an unfinished run {held}, and this one is {run}: give the same --part I/N, or --overwrite to"
        " start anew"
    )
