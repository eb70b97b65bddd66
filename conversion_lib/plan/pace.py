"""Interfaces that the engine needs: for a source that is fetched in parts, and for a journal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from conversion_lib.plan.pieces import Piece
from conversion_lib.plan.plan import Plan


class Pace(Protocol):
    """Sets the order of pieces for a source that is fetched in parts, and is told which pieces have been read."""

    def order(self, plan: Plan, todo: list[Piece]) -> list[Piece]:
        """Sorts `todo` in the order that suits the source. Called once, before any read."""
        ...

    def was_read(self, piece: Piece) -> None:
        """Notes that `piece` needs no more reads. Called from the threads that make pieces."""
        ...

    def end(self) -> None:
        """Notes that there are no more reads at all. Also called when the run fails."""
        ...


class Ledger(Protocol):
    """The engine's view of a journal."""

    def has(self, piece: Piece) -> bool:
        """Returns whether every chunk of `piece` is committed."""
        ...

    def add(self, pieces: Iterable[Piece]) -> None:
        """Notes a group of pieces whose data are durable."""
        ...
