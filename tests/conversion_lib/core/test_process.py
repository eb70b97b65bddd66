"""The process's memory, seen from fresh processes: the allocator's settings are the whole process's."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource
from conversion_lib.core.process import reuse_freed_memory
{setting}
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(48 << 20))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


PEAK = """
from conversion_lib.core.process import peak_bytes
before = peak_bytes()
held = bytearray(b"x") * (256 << 20)
print((peak_bytes() - before) >> 20)
"""


def _printed(code: str) -> int:
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def test_freed_memory_is_used_again_without_a_page_fault():
    reusing, plain = (_printed(FAULTS.format(setting=setting)) for setting in ("reuse_freed_memory()", ""))
    assert reusing * 20 < plain


def test_the_peak_is_of_what_was_touched():
    assert 256 <= _printed(PEAK) < 300


HOLES = """
from pathlib import Path
from conversion_lib.core.process import HeapLimit, reuse_freed_memory
reuse_freed_memory()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
heap = HeapLimit({allowed} << 20)
blocks = [bytearray(64 << 10) for _ in range(4096)]
del blocks[1::2]
held = resident()
heap.keep()
print(held - resident())
"""


def test_a_heap_above_its_limit_gives_back_the_holes_in_it():
    assert 100 <= _printed(HOLES.format(allowed=150)) <= 130


def test_a_heap_below_its_limit_keeps_them():
    assert _printed(HOLES.format(allowed=300)) <= 1
