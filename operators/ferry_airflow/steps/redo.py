"""Runs a command of `ferry` as a stage runs it: `python -m ferry_airflow.steps.redo COMMAND ARGUMENTS...`.

After the command has made its output, sizes and times of the output's files are noted beside it. If the stage is
cleared later and a file is missing or was changed since, the output is made again. If the command's input is gone, the
result names it, so that the stage can say which task makes it.

`--run-report URL` is the one option that ferry itself does not have: `check` leaves its page there, whatever the
verdict, and `publish` removes it, since it publishes the report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conversion_lib.cli.main import main as ferry
from conversion_lib.core.process import leave
from conversion_lib.errors import BadInput, CheckFailed, FerryError
from conversion_lib.program import fail
from conversion_lib.record import REPORT_PAGE_NAME, STEP_NAME
from conversion_lib.storage.files import write_atomically
from conversion_lib.storage.locations import location
from ferry_airflow.layout import note_of

INPUTS = {"check": ("--reference",)}
"""Options that name an input, by command. The first argument of each command is one."""
MAKERS = ("convert", "dequantize")
"""Commands whose second argument is their output."""

RUN_REPORT = "--run-report"

Noted = dict[str, list[int]]


class InputGone(BadInput):
    """An input does not exist. `details` has its path under `gone`."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is gone: clear the task that makes it as well")
        self._path = path

    @property
    def details(self) -> dict[str, str]:
        return {"gone": self._path}


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    arguments, report = _run_report(arguments)
    try:
        command, output = arguments[0], _output(arguments)
        _require_inputs(command, arguments)
        if output is not None and command in MAKERS and (problem := difference(output)):
            print(f"{output} is not as it was written: {problem}; making it again", file=sys.stderr, flush=True)
            arguments = [*arguments, "--overwrite"]
    except FerryError as error:
        return fail(error, "--json" in arguments)
    code = _run(arguments)
    if report is not None:
        _place_report(arguments, code, report)
    if code == 0 and output is not None and "--part" not in arguments:
        write_atomically(note_of(output), json.dumps(_files(output)).encode())
    return code


def difference(output: Path) -> str:
    """Returns how an output differs from what was noted of it; empty if it does not, or if nothing was noted."""
    try:
        noted: Noted = json.loads(note_of(output).read_text())
    except (OSError, ValueError):
        return ""
    found = _files(output)
    for name in sorted(noted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if found[name] != noted.get(name):
            return f"{name} was changed"
    return ""


def _files(output: Path) -> Noted:
    """Size and modification time (ns) of each file of a checkpoint; of a MaxText checkpoint without its report."""
    step = output / STEP_NAME
    root = step if step.is_dir() else output
    states = ((path, path.stat()) for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): [state.st_size, state.st_mtime_ns] for path, state in states}


def _run(arguments: list[str]) -> int:
    sys.argv = ["ferry", *arguments]
    try:
        ferry()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    return 0


def _run_report(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without --run-report, and its value."""
    if RUN_REPORT not in arguments:
        return arguments, None
    index = arguments.index(RUN_REPORT)
    return [*arguments[:index], *arguments[index + 2 :]], arguments[index + 1]


def _place_report(arguments: list[str], code: int, url: str) -> None:
    """Leaves or removes the page. A failure is only told: the verdict stands without it."""
    try:
        place = location(url)
        if arguments[0] == "publish" and code == 0:
            place.parent.remove([url.rsplit("/", 1)[1]])
        elif arguments[0] == "check" and code in (0, CheckFailed.exit_code):
            page = location(arguments[arguments.index("--report") + 1]) / REPORT_PAGE_NAME
            if content := page.read():
                place.parent.make()
                place.write(content)
    except (FerryError, OSError) as error:
        print(f"the report cannot be shown before publishing: {url}: {error}", file=sys.stderr, flush=True)


def _output(arguments: list[str]) -> Path | None:
    place = {**dict.fromkeys(MAKERS, 2), "finalize": 1}.get(arguments[0])
    return None if place is None or "://" in arguments[place] else Path(arguments[place])


def _require_inputs(command: str, arguments: list[str]) -> None:
    named = [arguments[1], *(arguments[arguments.index(option) + 1] for option in INPUTS.get(command, ()))]
    for path in named:
        if path.startswith("/") and not Path(path).exists():
            raise InputGone(path)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
