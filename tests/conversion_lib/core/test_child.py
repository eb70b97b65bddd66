"""Child processes: what they say, how they end, and that nothing of them is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conversion_lib.core.child import Child

IGNORES_SIGTERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_its_lines_and_its_exit_code() -> None:
    with Child(python("import sys; print('a\\n\\nb', file=sys.stderr); sys.exit(7)"), grace_seconds=5) as child:
        assert list(child.lines()) == ["a", "b"]
        assert child.wait() == 7
        assert child.poll() == 7


def test_what_it_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    leaves = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, file=sys.stderr)"
    with Child(python(leaves), grace_seconds=5) as child:
        (pid,) = (int(line) for line in child.lines())  # which holds standard error open as well
        assert child.wait() == 0
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


@pytest.mark.parametrize("how", ["end", "leave the block"])
def test_one_that_does_not_listen_is_killed(how: str) -> None:
    began = time.monotonic()
    with Child(python(IGNORES_SIGTERM), grace_seconds=0.3) as child:
        assert next(child.lines()) == "ready"
        assert child.poll() is None
        if how == "end":
            child.end()
            assert child.wait() == -9
    assert child.wait() == -9
    assert time.monotonic() - began < 30


def test_a_pipe_tells_it_that_its_parent_is_done(tmp_path: Path) -> None:
    waits = "import sys; print('ready', file=sys.stderr, flush=True); sys.stdin.read(); sys.exit(3)"
    outer = (
        "import os, subprocess, sys; from conversion_lib.core.child import Child\n"
        f"child = Child([sys.executable, '-c', {waits!r}], grace_seconds=5, stdin=subprocess.PIPE)\n"
        "next(child.lines()); print(child._process.pid, flush=True); os._exit(0)"
    )
    pid = int(subprocess.run(python(outer), capture_output=True, text=True, check=True, env=os.environ).stdout)
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)
