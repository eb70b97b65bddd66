"""A plan with its open source, and their costs: bytes to read, bytes on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conversion_lib.core.tensors import Source, stored_bytes
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.pace import Pace
from conversion_lib.plan.plan import Plan
from conversion_lib.record import Origin, SourceDtypes
from conversion_lib.storage.interface import Location

DISK_MARGIN = 1.05
"""Maximum bytes on disk per payload byte."""


@dataclass(frozen=True)
class Job:
    """An open source and the plan for it. Nothing has been written.

    Attributes:
        directory: The directory with the config, the tokenizer and other files to copy.
        config: The config.json to write.
        bytes_in: Bytes of the stored tensors that the plan reads.
        chunk_limit: The most bytes of a chunk.
        name: The checkpoint's name in messages.
        content: Returns the identity of the source's content at the time of the call, as in the plan's identity.
        pace: What sets the order of pieces; None: the order of the source's files.
        resident_bytes: Memory that the source needs in addition to the budget.
    """

    source: Source
    directory: Location
    config: ModelConfig
    origin: Origin
    plan: Plan
    bytes_in: int
    chunk_limit: int
    name: str
    content: Callable[[], Mapping[str, str]]
    pace: Pace | None = None
    source_dtypes: Callable[[], SourceDtypes | None] = lambda: None
    """Returns the dtypes of the source's tensors, which an export writes."""
    notes: tuple[str, ...] = ()
    """What a person should know before it runs, one line each."""
    resident_bytes: int = 0


def disk_bytes(plan: Plan) -> int:
    """Returns the most bytes that the result takes on disk; compression may reduce them."""
    return int(sum(array.stored_bytes for array in plan.arrays) * DISK_MARGIN) + (1 << 20)


def bytes_in(plan: Plan, source: Source) -> int:
    """Returns the stored bytes of the tensors that the plan reads. A tensor that several arrays use counts once."""
    taken = {part.tensor for array in plan.arrays for part in array.sources}
    return sum(stored_bytes(source, tensor) for tensor in taken)
