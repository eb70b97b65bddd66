"""`make fuzz`: a million variants, each read or refused with one line, without a traceback, a hang or 1 GiB more."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.targets import inputs, is_refused, variant

HANG_SECONDS = 10
MEMORY = 1 << 30


class Hang(BaseException):
    """An input took longer than HANG_SECONDS."""


def _hang(number: int, frame: object) -> None:
    raise Hang


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many variants")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _hang)
    done = refused = 0
    found: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as name:
        fuzzed = inputs(Path(name))
        for one in fuzzed.values():
            is_refused(one, one.valid)  # loads what is loaded lazily
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        until = time.monotonic() + options.seconds
        for seed in range(options.seed, options.seed + options.inputs):
            if time.monotonic() > until:
                break
            target = [*fuzzed][seed % len(fuzzed)]
            signal.alarm(HANG_SECONDS)
            try:
                refused += is_refused(fuzzed[target], variant(fuzzed[target], seed))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    break
                where = traceback.extract_tb(error.__traceback__)[-1]
                key = (target, f"{type(error).__name__} at {where.filename}:{where.lineno}")
                if key not in found:
                    print(f"{target}, seed {seed}: {key[1]}: {ascii(error)[:300]}", flush=True)
                found[key] = found.get(key, 0) + 1
            signal.alarm(0)
            done += 1
    print(f"{done} inputs: {refused} refused, {done - refused - sum(found.values())} read, {sum(found.values())} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
