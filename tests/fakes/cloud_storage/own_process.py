"""The fake in a process of its own: where it must not share a processor's lock with what is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_own_process(bucket: str, directory: Path | None = None) -> Iterator[str]:
    """Its endpoint, while it runs. Objects are kept in memory, or in files under `directory`."""
    command = [sys.executable, "-m", "tests.fakes.cloud_storage", bucket, *([str(directory)] if directory else [])]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
