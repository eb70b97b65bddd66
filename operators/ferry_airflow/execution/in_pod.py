"""What a pod's container runs: `python -m ferry_airflow.execution.in_pod MODULE ARGUMENTS...`.

It runs the command, whose log lines are the container's, and leaves its result as the container's termination message:
Kubernetes keeps that with the pod's status, so that neither a sidecar nor a volume is needed to hand it on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

MESSAGE_PATH = "/dev/termination-log"
MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message."""


def main(module: str, *arguments: str) -> int:
    """Runs the command and returns its exit code; a signal that ends it counts as shells count it, 128 and more."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments, "--json"], stdout=subprocess.PIPE)
    # as the first process of its container it hears SIGTERM only where it says so
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    output, _ = process.communicate()
    Path(os.environ.get("FERRY_TERMINATION_LOG") or MESSAGE_PATH).write_text(message(output))
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def message(output: bytes) -> str:
    """A command's result as JSON of at most 4096 bytes: without its lists, and then without what is longest."""
    try:
        result = json.loads(output)
    except ValueError:
        return ""
    small = {key: _plain(value) for key, value in result.items() if not isinstance(value, list)}
    while len(text := json.dumps(small)) > MESSAGE_BYTES:
        del small[max(small, key=lambda key: len(json.dumps(small[key])))]
    return text


def _plain(value: Any) -> Any:
    return {k: v for k, v in value.items() if not isinstance(v, list | dict)} if isinstance(value, dict) else value


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
