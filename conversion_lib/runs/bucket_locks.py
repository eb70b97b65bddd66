"""Which runs may be at work at the same time at a prefix in a bucket: what `locks` is for a directory.

A run of a part holds `claim-<part>.json`; who needs the place alone (a run of the whole, finalize, clean, beginning
anew) holds `claim.json`. Each takes its own first and then looks for those that exclude it, so that of two at the
same moment one at least sees the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from conversion_lib.errors import OutsideFailure
from conversion_lib.plan.parts import Part
from conversion_lib.progress import Reporter
from conversion_lib.runs.locks import CLAIM_NAME
from conversion_lib.storage import lease as claims
from conversion_lib.storage.gcs import BucketLocation
from conversion_lib.storage.gcs_client import delete, explained


class RunClaim(claims.Claim):
    """A claim that is not waited for."""

    def take_over(self, generation: int) -> bool:
        """Takes the claim where it is still at `generation`, 0 for none, and says whether."""
        self._generation = generation
        self.lost.clear()
        self.beat()
        return not self.lost.is_set()


def take_alone(work: BucketLocation, held: ExitStack, reporter: Reporter) -> RunClaim:
    """Holds the place alone until `held` is closed. Raises OutsideFailure where any run is at work."""
    return _take(work, f"{CLAIM_NAME}.json", lambda name: True, held, f"another run is at work in {work}", reporter)


def take_part(work: BucketLocation, part: Part, held: ExitStack, reporter: Reporter) -> RunClaim:
    """Holds a part until `held` is closed. Raises OutsideFailure where it, or one that is alone, is at work."""
    alone = f"{CLAIM_NAME}.json"
    busy = f"part {part}, or a run that needs the place alone, is at work in {work}"
    return _take(work, f"{CLAIM_NAME}-{part.index}.json", lambda name: name == alone, held, busy, reporter)


def _take(
    work: BucketLocation, mine: str, rivals: Callable[[str], bool], held: ExitStack, busy: str, reporter: Reporter
) -> RunClaim:
    busy = f"{busy}; wait for it to end"
    with explained(str(work), "claim the place"):
        dead = _standing_still(work, lambda name: name == mine or rivals(name), busy, reporter)
        claim = RunClaim((work / mine).blob)
        if not claim.take_over(dead.pop(mine, 0)):
            raise OutsideFailure(busy)
        held.enter_context(claim.kept_alive())
        for blob in work.blobs(CLAIM_NAME):
            name = blob.name.rpartition("/")[2]
            if name != mine and rivals(name):
                if dead.get(name) != blob.generation:
                    raise OutsideFailure(busy)
                delete(blob)
    return claim


def _standing_still(
    work: BucketLocation, watched: Callable[[str], bool], busy: str, reporter: Reporter
) -> dict[str, int]:
    """The claims of dead runs with their generations. Raises OutsideFailure as soon as one is rewritten."""
    seen: dict[str, int] | None = None
    since = time.monotonic()
    while True:
        names = ((blob.name.rpartition("/")[2], int(blob.generation)) for blob in work.blobs(CLAIM_NAME))
        there = {name: generation for name, generation in names if watched(name)}
        if seen is not None and any(seen.get(name) != generation for name, generation in there.items()):
            raise OutsideFailure(busy)
        if not there or time.monotonic() - since >= claims.DEAD_SECONDS:
            return there
        if seen is None:
            seen = there
            reporter.say(f"a run has claimed {work}: watching for up to {claims.DEAD_SECONDS:.0f} s whether it lives")
        time.sleep(claims.POLL_SECONDS)
