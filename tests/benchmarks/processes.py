"""Whole processes, measured: wall time, processor time and memory, start-up included."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One process from its start to its end.

    seconds: wall time. cpu_seconds: user and system time. peak_bytes: largest resident memory, as the kernel has it.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def measure(command: list[Any], environment: dict[str, str] | None = None) -> Measured:
    """Runs `command` to its end. Raises RuntimeError with what it last said where it fails."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=output, stderr=errors, env=os.environ | (environment or {}))
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said, complained = _content(output), _content(errors)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}: {said[-500:]}{complained[-3000:]}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said)


def _content(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def settle(source: list[Path], *, cold: bool) -> None:
    """Leaves the machine as every measured process should find it: nothing to write back, the source cached or not."""
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    buffer = bytearray(8 << 20)
    for path in source:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
