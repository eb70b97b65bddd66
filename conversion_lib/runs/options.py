"""How to run a conversion, as opposed to what to write. Imports nothing: every start of the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conversion_lib.plan.parts import Part

DEFAULT_BUDGET = 2 << 30
"""Bytes of memory."""

HELP, LEAST, BYTES = "help", "least", "bytes"
"""What a field's metadata may say to the command line: its description, its least value, and that it is a size.
A field without a description is no option."""


@dataclass(frozen=True)
class Options:
    """None of it changes a bit of the result but `chunk_bytes`' ceiling, an eighth of the memory budget."""

    memory_budget: int = field(
        default=DEFAULT_BUDGET, metadata={HELP: "Maximum memory to use, such as 2GiB.", BYTES: True}
    )
    threads: int | None = field(
        default=None, metadata={HELP: "Worker threads. Default: one per core, up to 16.", LEAST: 1}
    )
    overwrite: bool = field(default=False, metadata={HELP: "Replace what is at the destination."})
    skip_disk_check: bool = field(default=False, metadata={HELP: "Start even if the disk looks too small."})
    part: Part | None = None
    """The share that this worker does, without committing; None: all of it, and commit."""
    among_others: bool = False
    """Whether the destination may hold files of others, such as a training run's output; a foreign `0/` stays."""


DEFAULT_OPTIONS = Options()
