"""How to run a conversion, as opposed to what to write. Imports nothing: every start of the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conversion_lib.plan.parts import Part

DEFAULT_BUDGET = 2 << 30
"""Bytes of memory."""


@dataclass(frozen=True)
class Options:
    """None of it changes a bit of the result but `chunk_bytes`' ceiling, an eighth of the memory budget."""

    memory_budget: int = DEFAULT_BUDGET
    threads: int | None = None
    overwrite: bool = False
    skip_disk_check: bool = False
    part: Part | None = None
    """The share that this worker does, without committing; None: all of it, and commit."""
    among_others: bool = False
    """Whether the destination may hold files of others, such as a training run's output; a foreign `0/` stays."""


DEFAULT_OPTIONS = Options()
