"""Stands in for ferry in tests of the DAG alone: answers each command with what the contract says.

FAKE_FERRY_FAULTS (a JSON file) maps a command to the exit codes of its next calls, `busy` for one that finds another
run at work; FAKE_FERRY_CALLS is appended to.
"""

import json
import os
import sys
from pathlib import Path


def next_exit_code(command):
    faults_path = Path(os.environ["FAKE_FERRY_FAULTS"])
    faults = json.loads(faults_path.read_text())
    codes = faults.get(command, [])
    code = codes.pop(0) if codes else 0
    faults_path.write_text(json.dumps(faults))
    return code


def result(command, arguments):
    measures = {"seconds": 0.1, "bytes_in": 1, "bytes_out": 2, "peak_bytes": 3}
    if command == "resolve":
        work = os.environ["FERRY_WORK_DIR"] + "/source"
        own = {"repo": arguments[0], "commit": None, "files": 1, "path": arguments[0], "work_dir": work}
        own |= {"quantized": True, "model": "m", "published": None, "plan": {"bytes_out": 2}}
    elif command == "dequantize":
        own = {"path": arguments[1], "fingerprint": "f", "already": False}
    elif command == "convert":
        own = {"path": arguments[1], "fingerprint": "f", "pieces": 1, "pieces_skipped": 0, "already": False}
    elif command == "finalize":
        own = {"path": arguments[0], "fingerprint": "f", "chunks": 1, "already": False}
    elif command == "clean-up":
        own = {"removed": [], "bytes_freed": 0}
    elif command == "check":
        own = {"verdict": "pass", "max_kl": 1e-9, "digest": "d", "report": arguments[4] + "/report.html"}
    else:
        own = {"url": arguments[1] + "/m/c/t", "files": 1, "bytes": 2, "digest": "d"}
    return {**measures, **own}


def main(command, *arguments):
    assert arguments[-1] == "--json"
    arguments = arguments[:-1]
    with open(os.environ["FAKE_FERRY_CALLS"], "a") as calls:
        calls.write(json.dumps([command, *arguments]) + "\n")
    code = next_exit_code(command)
    if code == "busy":
        print(json.dumps({"error": "another run is at work", "exit_code": 3, "waits_for": "another run"}))
        code = 3
    if code:
        print(f"ferry: {command} went wrong", file=sys.stderr)
        return code
    print(json.dumps(result(command, arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
