"""What the engine asks of those around it: of a source that does not lie here as a whole, and of a journal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from conversion_lib.plan.pieces import Piece
from conversion_lib.plan.plan import Plan


class Pace(Protocol):
    """For a source that does not lie here as a whole: the order to make pieces in, and when one has been read."""

    def order(self, plan: Plan, todo: list[Piece]) -> list[Piece]:
        """`todo` in the order that suits the source; called once, before anything is read."""
        ...

    def was_read(self, piece: Piece) -> None:
        """Nothing more will be read for `piece`; called from the threads that make them."""
        ...

    def end(self) -> None:
        """Nothing more will be read at all; called too where the run fails."""
        ...


class Ledger(Protocol):
    """What the engine asks and tells of a journal."""

    def has(self, piece: Piece) -> bool:
        """Whether every chunk of `piece` is committed."""
        ...

    def add(self, pieces: Iterable[Piece]) -> None:
        """Notes a group whose data are durable."""
        ...
