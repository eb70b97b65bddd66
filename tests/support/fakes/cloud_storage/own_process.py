"""The fake in a process of its own: where it must not share a processor's lock with what is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.paths import ROOT


@contextmanager
def in_own_process(bucket: str, directory: Path | None = None) -> Iterator[str]:
    """Its endpoint, while it runs. Objects are kept in memory, or in files under `directory`."""
    command = [
        sys.executable,
        "-m",
        "tests.support.fakes.cloud_storage",
        bucket,
        *([str(directory)] if directory else []),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
