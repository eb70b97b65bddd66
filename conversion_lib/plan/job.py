"""A plan with the source that it reads, and what the two cost: bytes read, bytes on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conversion_lib.core.tensors import Source, stored_bytes
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.pace import Pace
from conversion_lib.plan.plan import Plan
from conversion_lib.record import Origin
from conversion_lib.storage.interface import Location

DISK_MARGIN = 1.05
"""Maximum bytes on disk per payload byte."""


@dataclass(frozen=True)
class Job:
    """A source that is open and the plan made for it; nothing has been written.

    directory: with config, tokenizer and the other files that go along.
    name: what messages call the checkpoint. content: what is known of it at the time of the call, without reading it,
        as the plan's identity has it.
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
    resident_bytes: int = 0
    """Memory that the source takes beside what the budget covers."""


def disk_bytes(plan: Plan) -> int:
    """What the result takes on disk at most: compression may make it less."""
    return int(sum(array.stored_bytes for array in plan.arrays) * DISK_MARGIN) + (1 << 20)


def bytes_in(plan: Plan, source: Source) -> int:
    """Bytes of the tensors that the plan takes; one that several arrays take a part of counts once."""
    taken = {part.tensor for array in plan.arrays for part in array.sources}
    return sum(stored_bytes(source, tensor) for tensor in taken)
