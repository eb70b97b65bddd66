"""What goes wrong between a client and the fake: by rule, or by chance with a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Literal

What = Literal["status", "reset", "cut", "slow"]


@dataclass
class Fault:
    """What happens to requests of `method` on objects whose name fits `name`: `times` of them, after `skip` others.

    what:
        status: answered with `status`.
        reset: the connection is reset in mid body, `after` bytes into what is uploaded or downloaded.
        cut: the same, but the connection is closed as if that were all.
        slow: goes on as it should, `seconds` later.
    applied: an upload or a deletion takes effect all the same, and only its answer is lost.
    """

    status: int = 503
    method: str = "*"
    name: str = "*"
    times: int = 1
    skip: int = 0
    applied: bool = False
    what: What = "status"
    after: int = 0
    seconds: float = 0.0

    def fits(self, method: str, name: str) -> bool:
        return self.times > 0 and fnmatch(method, self.method) and fnmatch(name, self.name)


MIXED = (
    Fault(503),
    Fault(429),
    Fault(503, applied=True),
    Fault(what="reset"),
    Fault(what="reset", applied=True),
    Fault(what="reset", after=300_000),
    Fault(what="cut", after=5_000),
    Fault(what="slow", seconds=0.05),
)


@dataclass
class Chance:
    """One request in 1/`rate` meets one of `faults`.

    Which ones depends on `seed`, the method, the object and how many such requests came before, not on the order in
    which threads happen to ask.
    """

    rate: float
    seed: int = 0
    faults: tuple[Fault, ...] = MIXED
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def draw(self, method: str, name: str) -> Fault | None:
        count = self.counts[method, name] = self.counts.get((method, name), 0) + 1
        dice = random.Random(f"{self.seed}/{method}/{name}/{count}")
        return dice.choice(self.faults) if dice.random() < self.rate else None
