"""Which runs may work at one destination at the same time.

A run of a part holds the part's lease. A process that needs the destination alone (a run of the whole, finalize, clean,
and a part that begins a run) holds the lease of the whole. Each takes its own lease first and then looks for leases
that exclude it, so that of two that start at the same moment, at least one sees the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from conversion_lib.errors import OutsideFailure
from conversion_lib.plan.parts import Part
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.storage import lease as leases
from conversion_lib.storage.interface import Location
from conversion_lib.storage.lease import LEASE_NAME, Lease, State

ALONE = f"{LEASE_NAME}.json"


def lease_of(part: Part) -> str:
    """Returns the name of a part's lease."""
    return f"{LEASE_NAME}-{part.index}.json"


class Busy(OutsideFailure):
    """Another run is at work.

    Args:
        message: What is busy.
        lease: The name of the lease that the other run holds.
        holder: Who the other run is, as the lease says.
    """

    def __init__(self, message: str, lease: str, holder: str) -> None:
        super().__init__(f"{message} ({holder}); wait for it to end")
        self.lease, self.holder = lease, holder

    @property
    def details(self) -> dict[str, str]:
        return {"waits_for": self.holder}


class Locks:
    """The leases that one run holds in the work directory `work`. The reporter is told when the run waits."""

    def __init__(self, work: Location, reporter: Reporter = SILENT) -> None:
        self._work, self._reporter = work, reporter
        self._held: dict[str, Lease] = {}

    def take_alone(self) -> None:
        """Takes the lease of the whole destination.

        Raises:
            Busy: Another run is at work.
        """
        self._take(ALONE, lambda name: True)

    def take_part(self, part: Part) -> None:
        """Takes the lease of a part, and releases that of the whole.

        Raises:
            Busy: Another run has the same part, or the destination alone.
        """
        try:
            self._take(lease_of(part), lambda name: name == ALONE)
        except Busy as busy:
            if busy.lease != ALONE:
                message = f"another run of part {part} is at work in {self._work}"
                raise Busy(message, busy.lease, busy.holder) from None
            raise
        if ALONE in self._held:
            self._held.pop(ALONE).release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the destination alone until the block ends.

        Raises:
            Busy: Another run is at work.
        """
        try:
            self.take_alone()
            yield
        finally:
            self.release()

    def require(self) -> None:
        """Checks that this run still holds its leases.

        Raises:
            OutsideFailure: Another run has taken one over.
        """
        for lease in self._held.values():
            lease.require(str(self._work))

    def release(self) -> None:
        """Releases all leases that are held."""
        while self._held:
            self._held.popitem()[1].release()

    def _take(self, mine: str, excludes: Callable[[str], bool]) -> None:
        lease = (self._work / mine).lease()
        expired = self._none_alive(mine, lease, excludes)
        if not lease.acquire():
            raise self._busy(mine)
        self._held[mine] = lease
        for name in self._rivals(mine, excludes):
            if name not in expired or expired[name].look() is not State.FREE:
                self._held.pop(mine).release()
                raise self._busy(name)
            expired[name].discard()

    def _none_alive(self, mine: str, lease: Lease, excludes: Callable[[str], bool]) -> dict[str, Lease]:
        """Returns the conflicting leases by name once all have expired. Raises Busy as soon as one proves alive."""
        watched = {mine: lease}
        told = False
        while True:
            for name in self._rivals(mine, excludes):
                watched.setdefault(name, (self._work / name).lease())
            states = {name: one.look() for name, one in watched.items()}
            if alive := [name for name, state in states.items() if state is State.HELD]:
                raise self._busy(alive[0])
            if State.WATCHED not in states.values():
                return watched
            if not told:
                seconds = f"{leases.EXPIRED_SECONDS:.0f}"
                self._reporter.say(
                    f"a run holds a lease in {self._work}: watching for up to {seconds} s whether it is alive"
                )
                told = True
            time.sleep(leases.POLL_SECONDS)

    def _rivals(self, mine: str, excludes: Callable[[str], bool]) -> list[str]:
        """Returns the names of existing leases that conflict with `mine`."""
        names = (name for name in self._work.children() if name.startswith(LEASE_NAME) and excludes(name))
        return sorted(name for name in names if name != mine and name not in self._held)

    def _busy(self, lease: str) -> Busy:
        note = (self._work / lease).lease().read()
        return Busy(f"another run is at work in {self._work}", lease, str(note) if note else "it has just ended")
