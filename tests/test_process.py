"""The process's memory, seen from fresh processes: the allocator's settings are the whole process's."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource
from conversion_lib.process import reuse_freed_memory
{setting}
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(48 << 20))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


PEAK = """
from conversion_lib.process import peak_bytes
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
