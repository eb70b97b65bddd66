"""How to run a conversion, as opposed to what to write. Imports little, since every command line loads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conversion_lib.plan.parts import Part

DEFAULT_BUDGET = 2 << 30
"""Bytes of memory."""

HELP, LEAST, BYTES = "help", "least", "bytes"
"""Keys of a field's metadata for the command line: its description, its minimum, and that it is a size in bytes. A
field without a description is not an option."""


@dataclass(frozen=True)
class Options:
    """How to run. The result does not depend on it, except that a chunk takes at most an eighth of the memory budget.

    Attributes:
        memory_budget: Bytes.
        threads: None: one per core, up to 16.
        overwrite: Replaces what is at the destination.
        skip_disk_check: Starts even if the disk looks too small.
        part: The share that this process writes, without committing. None: all of it, and commit.
        among_others: The destination may hold other files, such as a training run's output. A foreign `0/` stays.
    """

    memory_budget: int = field(
        default=DEFAULT_BUDGET, metadata={HELP: "Maximum memory to use, such as 2GiB.", BYTES: True}
    )
    threads: int | None = field(
        default=None, metadata={HELP: "Worker threads. Default: one per core, up to 16.", LEAST: 1}
    )
    overwrite: bool = field(default=False, metadata={HELP: "Replace what is at the destination."})
    skip_disk_check: bool = field(default=False, metadata={HELP: "Start even if the disk looks too small."})
    part: Part | None = None
    among_others: bool = False


DEFAULT_OPTIONS = Options()
