"""A child process that is watched until it ends, and whose process group is killed then."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

_PR_SET_PDEATHSIG = 1


class Child:
    """A process that leads its own group. When it ends, the rest of the group is killed.

    As a context manager, it does not outlive the block: if it still runs, it gets SIGTERM, and SIGKILL after the grace.

    Args:
        command: The program and its arguments.
        grace_seconds: Time from SIGTERM to SIGKILL.
        env: The environment. None: this process's.
        cwd: The working directory. None: this process's.
        stdin: As for Popen. A pipe stays open until the block ends: a child that reads it notices its parent's death.
        stdout: As for Popen.
        stderr: As for Popen. A pipe is read with `lines`.
        pass_fds: Descriptors that the child inherits.
        dies_with_parent: On Linux, the child is killed when the thread that started it ends, even without warning
            (SIGKILL, out of memory). Not for a process with many threads: Python code runs in the child before exec.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        grace_seconds: float,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | IO[str] | IO[bytes] = subprocess.DEVNULL,
        stderr: int = subprocess.PIPE,
        pass_fds: Sequence[int] = (),
        dies_with_parent: bool = False,
    ) -> None:
        self._grace_seconds = grace_seconds
        self._reaped = False
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent() if dies_with_parent else None,
        )
        self._sweeper = threading.Thread(target=self._sweep, daemon=True)
        self._sweeper.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._sweeper.is_alive():
            self._signal(signal.SIGTERM)
            self._sweeper.join(self._grace_seconds)
            self._signal(signal.SIGKILL)
        self.wait()
        for stream in (self._process.stdin, self._process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def lines(self) -> Iterator[str]:
        """Yields the lines of its standard error as they come, without empty ones, until it ends."""
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            if line := raw.rstrip():
                yield line

    def poll(self) -> int | None:
        """Returns its exit code, negative for a signal, or None while it runs."""
        return None if self._sweeper.is_alive() else self.wait()

    def wait(self) -> int:
        """Waits until the whole group has ended, and returns the child's exit code, negative for a signal."""
        self._sweeper.join()
        self._reaped = True
        return self._process.wait()

    def end(self) -> None:
        """Ends its group: SIGTERM now, SIGKILL after the grace. Returns at once; `wait` waits for the end.

        A signal handler may call it, so it takes no lock that the interrupted code might hold.
        """
        self._signal(signal.SIGTERM)
        timer = threading.Timer(self._grace_seconds, self._signal, [signal.SIGKILL])
        timer.daemon = True
        timer.start()

    def _signal(self, number: signal.Signals) -> None:
        if not self._reaped:  # after that, the pid may belong to another process
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _sweep(self) -> None:
        """Waits for its end, then kills the rest of its group.

        It is not reaped before that (WNOWAIT), so that no other group can have its number.
        """
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            self._process.wait()
            return
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self._signal(signal.SIGKILL)


def _die_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
