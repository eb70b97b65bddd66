"""Which runs may be at work at one destination at the same time.

A run of a part holds the part's lease. Whoever needs the destination alone (a run of the whole, finalize, clean, and a
part that begins a run) holds the lease of the whole. Each takes its own first and then looks for those that exclude
it, so that of two at the same moment one at least sees the other.
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
    """The name of a part's lease."""
    return f"{LEASE_NAME}-{part.index}.json"


class Busy(OutsideFailure):
    """Another run is at work. lease: the name of the lease that it holds."""

    def __init__(self, message: str, lease: str) -> None:
        super().__init__(f"{message}; wait for it to end")
        self.lease = lease


class Locks:
    """What one run holds of the work directory `work`. reporter: told when the run waits."""

    def __init__(self, work: Location, reporter: Reporter = SILENT) -> None:
        self._work, self._reporter = work, reporter
        self._held: dict[str, Lease] = {}

    def take_alone(self) -> None:
        """Holds the destination alone. Raises Busy where any run is at work."""
        self._take(ALONE, lambda name: True)

    def take_part(self, part: Part) -> None:
        """Holds a part, and no longer the whole. Raises Busy where the part, or one that is alone, is at work."""
        try:
            self._take(lease_of(part), lambda name: name == ALONE)
        except Busy as busy:
            if busy.lease != ALONE:
                raise Busy(f"part {part} is at work already in {self._work}", busy.lease) from None
            raise
        if ALONE in self._held:
            self._held.pop(ALONE).release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the destination alone while the context lasts. Raises Busy where any run is at work."""
        try:
            self.take_alone()
            yield
        finally:
            self.release()

    def require(self) -> None:
        """Raises OutsideFailure where another run has taken over."""
        for lease in self._held.values():
            lease.require(str(self._work))

    def release(self) -> None:
        """Gives back what is held."""
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
        """The leases in the way, by name, once all of them have expired. Raises Busy as soon as one is seen alive."""
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
                    f"a run holds a lease in {self._work}: watching for up to {seconds} s if it is alive"
                )
                told = True
            time.sleep(leases.POLL_SECONDS)

    def _rivals(self, mine: str, excludes: Callable[[str], bool]) -> list[str]:
        """The names of the leases there are of runs that may not be at work beside this one."""
        names = (name for name in self._work.children() if name.startswith(LEASE_NAME) and excludes(name))
        return sorted(name for name in names if name != mine and name not in self._held)

    def _busy(self, lease: str) -> Busy:
        return Busy(f"another run is at work in {self._work}", lease)
