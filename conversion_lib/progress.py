"""Progress of long work: a bar with bytes, rate and time left on a terminal, plain lines elsewhere.

Everything goes to standard error, since standard output is for results.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from conversion_lib.shown import escaped, escaped_lines, one_line

LINE_SECONDS = 10.0
"""Shortest time between two lines of progress when there is no terminal."""


class PlainConsole(Console):
    """A console to which text is only text: no markup, no emoji codes, and nothing that a terminal would obey."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns the text to show: what it holds of markup and control characters as it is, or escaped."""
        return super().render_str(escaped_lines(text), **{**options, "markup": False, "emoji": False})


class Task:
    """Progress of one piece of long work, in bytes. Several threads may advance it."""

    def __init__(self, reporter: Reporter, name: str, total: int) -> None:
        self._reporter, self._name, self._total = reporter, name, total
        self._done, self._started = 0, time.monotonic()
        self._last_line = self._started
        self._lock = threading.Lock()
        self._bar: tuple[Progress, int] | None = None

    @property
    def state(self) -> str:
        """The progress as text, such as '1.5 GB of 3.0 GB'."""
        return f"{format_bytes(self._done)} of {format_bytes(self._total)}"

    def advance(self, nbytes: int) -> None:
        """Adds to the bytes that are done, and shows the progress."""
        with self._lock:
            self._done += nbytes
            if self._bar is not None:
                progress, task_id = self._bar
                progress.update(task_id, completed=self._done)  # type: ignore[arg-type]
            elif time.monotonic() - self._last_line >= LINE_SECONDS:
                self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = self._done / max(self._last_line - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        self._reporter.say(f"{self._name}: {self.state}, {format_bytes(rate)}/s, {left:.0f} s left")


class Reporter:
    """Shows progress and messages on standard error.

    Args:
        mode: "auto" draws bars on a terminal and writes lines elsewhere. "quiet" is silent.
        log_format: "text", or "json" for one JSON object per line with `time` (Unix seconds) and `message`.
    """

    def __init__(self, mode: Literal["auto", "quiet"] = "auto", log_format: Literal["text", "json"] = "text") -> None:
        self._quiet, self._json = mode == "quiet", log_format == "json"
        self._console = PlainConsole(stderr=True)

    def say(self, message: str) -> None:
        """Shows a message of one line."""
        if self._quiet:
            return
        message = one_line(message)
        if self._json:
            print(json.dumps({"time": round(time.time(), 3), "message": message}), file=sys.stderr, flush=True)
        elif self._console.is_terminal:
            self._console.print(message, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str, total_bytes: int) -> Iterator[Task]:
        """Yields a Task to advance, and shows its progress under `name` until the block ends."""
        task = Task(self, name, total_bytes)
        if self._quiet or self._json or not self._console.is_terminal:
            yield task
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task._bar = (progress, progress.add_task(escaped(name), total=total_bytes))
            yield task


SILENT = Reporter("quiet")


def format_bytes(count: float) -> str:
    """Formats a number of bytes: 1536 -> '1.5 kB'. Units are powers of ten, as for disks and networks."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
