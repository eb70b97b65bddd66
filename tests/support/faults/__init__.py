"""Faults in a real process: its system calls watched, failed, or taken as moments to stop it at, by `shim.c`.

The product has no hooks for this. The shim is preloaded into the `ferry` process that a test starts, so that what
Python and what TensorStore ask of the kernel are treated alike.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.checkpoints import Result


@dataclass(frozen=True)
class Fault:
    """What to do at the `nth` call of a kind (read, write, sync, rename, remove, any) on a path that fits `glob`.

    what: stop or term, once, before the call; eio or enospc, for that call and all that follow.
    """

    call: str
    glob: str
    nth: int = 1
    what: str = "stop"

    def __str__(self) -> str:
        return f"{self.call},{self.glob},{self.nth},{self.what}"


def build_shim(directory: Path) -> Path:
    """Compiles the shim into `directory`. Skips the test where there is no Linux with a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("faults are made by a preloaded library: needs Linux and a C compiler")
    library = directory / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return library


class Run:
    """A process that may be stopped, looked at and killed."""

    def __init__(self, arguments: list[str], shim: Path, fault: Fault | None = None, log: Path | None = None) -> None:
        environment = os.environ | {"LD_PRELOAD": str(shim)}
        environment |= {"FERRY_FAULT": str(fault)} if fault else {}
        environment |= {"FERRY_FAULT_LOG": str(log)} if log else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(arguments, text=True, env=environment, **pipes)

    def wait_until_stopped(self) -> None:
        """Returns when the fault, or `stop`, has stopped it. Fails where it ends before."""
        found = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if found is None or found.si_code != os.CLD_STOPPED:
            result = self.end()
            pytest.fail(f"ended before it was stopped, with {result.returncode}: {result.stdout}{result.stderr}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        self.wait_until_stopped()

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @property
    def written(self) -> int:
        """Bytes that it has asked the kernel to write, to whatever file."""
        lines = Path(f"/proc/{self.process.pid}/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))

    def kill(self) -> None:
        self.process.kill()
        assert self.end().returncode == -signal.SIGKILL

    def end(self, timeout: float = 120) -> Result:
        """Waits for its end."""
        out, err = self.process.communicate(timeout=timeout)
        return Result([], self.process.returncode, out, err)
