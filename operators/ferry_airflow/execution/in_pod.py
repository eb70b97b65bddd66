"""What a pod's container runs: `python -m ferry_airflow.execution.in_pod MODULE ARGUMENTS...`.

It runs the command, whose log lines become the container's. It writes the result to the container's termination
message. Kubernetes keeps the message in the pod's status, so the result needs no sidecar and no volume.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from conversion_lib.core.documents import parse_json
from conversion_lib.core.plain_json import to_json
from conversion_lib.errors import BadInput

MESSAGE_PATH = "/dev/termination-log"
MESSAGE_BYTES = 4096
"""Kubernetes truncates a longer termination message."""


def main(module: str, *arguments: str) -> int:
    """Runs the command and returns its exit code; if a signal ended it, 128 plus the signal's number, as in a shell."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments, "--json"], stdout=subprocess.PIPE)
    # the first process of a container gets SIGTERM only if it has a handler for it
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    output, _ = process.communicate()
    Path(os.environ.get("FERRY_TERMINATION_LOG") or MESSAGE_PATH).write_text(message(output))
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def message(output: bytes) -> str:
    """Returns a command's result as JSON of at most 4096 bytes, without lists and, if needed, the longest values.

    Args:
        output: The command's standard output.

    Returns:
        The JSON; empty if the output is not a JSON object.
    """
    try:
        result = parse_json(output, "the command's result")
    except BadInput:
        return ""
    small = {key: _plain(value) for key, value in result.items() if not isinstance(value, list)}
    while len(text := to_json(small)) > MESSAGE_BYTES:
        del small[max(small, key=lambda key: len(to_json(small[key])))]
    return text


def _plain(value: Any) -> Any:
    return {k: v for k, v in value.items() if not isinstance(v, list | dict)} if isinstance(value, dict) else value


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
