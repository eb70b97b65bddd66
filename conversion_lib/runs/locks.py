"""The locks of one destination: which runs may be at work there at the same time.

Parts hold `lock` together, and each its own `lock-<index>` alone. Whoever needs the place for itself (a run of the
whole, finalize, clean, beginning anew) holds `lock` alone. The kernel lets go of a lock when its process ends. File
systems without locks are taken as they are.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import AbstractContextManager
from pathlib import Path

from conversion_lib.errors import OutsideFailure
from conversion_lib.plan.parts import Part
from conversion_lib.storage.files import one_at_a_time

LOCK_NAME = "lock"
CLAIM_NAME = "claim"
"""In a bucket, where the kernel knows no locks: see `cloud.locks`."""


class Locks:
    """What one process holds in the work directory `work`."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._held: dict[str, int] = {}

    def entering(self) -> AbstractContextManager[None]:
        """Lets one process at a time look at what is there and take its locks; others wait that short while."""
        return one_at_a_time(self._work / f"{LOCK_NAME}-entering", lambda: None)

    def take_alone(self) -> None:
        """Raises OutsideFailure where any other run is at work, and where the directory has gone meanwhile."""
        self._take(LOCK_NAME, fcntl.LOCK_EX, f"another run is at work in {self._work}")

    def take_part(self, part: Part) -> None:
        """Raises OutsideFailure where the same part is at work, or somebody who needs the place alone."""
        self._take(LOCK_NAME, fcntl.LOCK_SH, f"another run is at work in {self._work}")
        self._take(f"{LOCK_NAME}-{part.index}", fcntl.LOCK_EX, f"part {part} is at work already in {self._work}")

    def _take(self, name: str, kind: int, busy: str) -> None:
        path = self._work / name
        if name not in self._held:
            self._held[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        descriptor = self._held[name]
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:
            return  # some network file systems have no locks
        else:
            # a run that was just finishing has removed the file: then the lock is on nothing
            held = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        if not held:
            self.release()
            raise OutsideFailure(f"{busy}; wait for it to end")

    def release(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])
