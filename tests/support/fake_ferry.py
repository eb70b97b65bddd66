"""Stands in for ferry: `fake_ferry.py BEHAVIOUR ARGUMENTS...`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def say(line):
    print(line, file=sys.stderr, flush=True)


def echo(arguments):
    """Does well; the result says what it was given."""
    say("one of two")
    say("two of two")
    seen = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "AIRFLOW_"))}
    print(json.dumps({"arguments": arguments, "environment": seen, "seconds": 1.5, "peak_bytes": 7}))


def fail(arguments):
    """`fail CODE ...`: ends with that exit code, after an error line of ferry's kind."""
    say("working")
    say("ferry: model.safetensors: no such tensor")
    print(json.dumps({"verdict": "fail", "max_kl": 0.5}))
    return int(arguments[0])


def fail_with_repo(arguments):
    """`fail_with_repo download REPO ...`: the repository's name is the exit code."""
    return fail(arguments[1:])


def silent(arguments):
    return int(arguments[0])


def crash(arguments):
    return nothing  # noqa: F821


def slow(arguments):
    """`slow PIDS ...`: writes its and its child's process numbers there, and ends on SIGTERM as ferry does."""
    _hang(Path(arguments[0]), signal_handler=lambda *_: sys.exit(143))


def deaf(arguments):
    """As slow, but neither it nor its child listens to SIGTERM."""
    _hang(Path(arguments[0]), signal_handler=signal.SIG_IGN)


def leaves_child(arguments):
    """Does well at once, but a child that holds its log open stays behind."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(arguments[0]).write_text(json.dumps([child.pid]))
    print("{}")


def _hang(pids, signal_handler):
    signal.signal(signal.SIGTERM, signal_handler)
    # An ignored signal stays ignored in the child; a handler does not.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    unfinished = pids.with_suffix(".tmp")
    unfinished.write_text(json.dumps([os.getpid(), child.pid]))
    unfinished.rename(pids)
    say("started")
    time.sleep(600)


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
