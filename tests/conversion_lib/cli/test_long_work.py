"""Long work of `ferry` as a process: on a terminal, ended by a signal, and gone on with."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.engine.limits import Limits
from tests.support.checkpoints import QWEN3, Result, answer, command, ferry_here, random_tensors, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """51 MB, so that there is time to end a conversion midway."""
    config = QWEN3 | {"vocab_size": 12_011, "hidden_size": 1024}
    return write_checkpoint(tmp_path_factory.mktemp("large"), config, random_tensors(llama_tensors(config)))


def slowly(source: Path, destination: Path, *storage: str) -> list[str]:
    """A conversion of many small groups on one thread."""
    options = ("--save-dtype", "float32", "--memory-budget", "64MiB", "--threads", 1)
    return command("convert", source, destination, *options, *storage, "--json")


def on_a_terminal(arguments: list[str]) -> tuple[Result, str]:
    """Runs a command with a terminal for its standard error; returns what the terminal got besides."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    shown = bytearray()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=follower, text=True, env=environment) as process:
        os.close(follower)
        try:
            while part := os.read(leader, 65536):
                shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(leader)
        out = process.stdout.read()
    return Result(arguments, process.returncode, out, ""), shown.decode()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, large) -> tuple[Path, dict[str, Any], str]:
    """The large conversion in one go, its answer, and what it showed on a terminal."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    result, shown = on_a_terminal(slowly(large, out))
    return out, answer(result), shown


def test_progress_on_a_terminal(undisturbed):
    """A bar, bytes, a rate and the time left; standard output holds the result alone."""
    _, result, shown = undisturbed
    assert result["pieces"] > 10
    assert "convert" in shown
    assert "━" in shown
    assert "/101.1 MB" in shown
    assert re.search(r"\d+\.\d MB/s", shown)
    assert re.search(r"0:00:\d\d", shown)


def begin(arguments: list[str], destination: Path) -> subprocess.Popen[str]:
    """Starts a conversion and returns when it has journaled its first group."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = destination / ".ferry" / "journal-0.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.002)
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> Result:
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return Result(process.args, process.returncode, out, err)


def looks_unfinished(destination: Path) -> bool:
    import orbax.checkpoint as ocp

    latest = ocp.CheckpointManager(destination).latest_step()
    return latest is None and [path.name for path in destination.iterdir()] == [".ferry"]


@pytest.mark.parametrize(
    ("number", "storage"),
    [(signal.SIGTERM, ()), (signal.SIGKILL, ()), (signal.SIGKILL, ("--pathways",))],
    ids=["SIGTERM", "SIGKILL", "SIGKILL-pathways"],
)
def test_a_killed_conversion_goes_on(tmp_path, large, undisturbed, number, storage):
    arguments = slowly(large, tmp_path / "out", *storage)
    ended = end(begin(arguments, tmp_path / "out"), number)
    if number == signal.SIGTERM:
        error = answer(ended, code=143)
        assert (error["exit_code"], ended.stderr) == (143, f"ferry: {error['error']}\n")
    else:
        assert ended.returncode == -signal.SIGKILL
    assert looks_unfinished(tmp_path / "out")

    whole, first, _ = undisturbed
    result = answer(subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False))
    assert result["pieces_skipped"] > 0
    assert result["pieces"] + result["pieces_skipped"] == first["pieces"]
    assert result["bytes_out"] < first["bytes_out"]
    assert (result["fingerprint"] == first["fingerprint"]) is (storage == ())
    assert not (tmp_path / "out" / ".ferry").exists()
    assert answer(ferry_here("compare", tmp_path / "out", whole, "--json"))["same"]
    # what was in flight is written again, and its first writing stays where it shares a file with what was journaled
    in_flight = Limits.of(64 << 20, 1).buffers
    assert size_of(tmp_path / "out") < 1.02 * size_of(whole) + in_flight, "what the killed run left is swept"


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_sigterm_while_a_library_is_imported():
    """What an extension module makes of the signal's exception does not matter: the command ends with 143."""
    lines = (
        "import os, signal, typer",
        "from conversion_lib.cli.command import command",
        "app = typer.Typer()",
        "@command(app, 'import')",
        "def importing(reporter):",
        "    try: os.kill(os.getpid(), signal.SIGTERM); signal.sigtimedwait([], 5)",
        "    except Exception as error: raise ImportError('initialization failed') from error",
        "app(['--json'])",
    )
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert answer(result, code=143)["exit_code"] == 143


def test_sigterm_whose_exception_is_lost():
    """As in a callback; the command goes on, and ends in time all the same."""
    lines = (
        "import os, signal, time, typer, weakref",
        "from conversion_lib.cli.command import command",
        "app = typer.Typer()",
        "class Some: pass",
        "@command(app, 'lose')",
        "def losing(reporter):",
        "    some = Some()",
        "    kept = weakref.ref(some, lambda _: signal.raise_signal(signal.SIGTERM))",
        "    del some",
        "    time.sleep(60)",
        "app(['--json'])",
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert answer(result, code=143)["exit_code"] == 143
    assert result.stderr.endswith("the same command resumes from there\n")
    assert time.monotonic() - started < 30


def test_one_run_at_a_time_and_clean(tmp_path, large, monkeypatch):
    """A second run and `clean` leave a running one alone; what a dead one left is cleaned."""
    out = tmp_path / "out"
    monkeypatch.setenv("FERRY_HOLDER", "convert of r")
    process = begin(slowly(large, out), out)
    process.send_signal(signal.SIGSTOP)
    for second in (slowly(large, out), command("clean", out, "--json")):
        result = subprocess.run(second, capture_output=True, text=True, timeout=60, check=False)
        told = answer(result, code=3)
        assert told["waits_for"].startswith(f"convert of r, process {process.pid} on ")
        assert f"another run is at work in {out / '.ferry'} ({told['waits_for']})" in told["error"]
    assert end(process, signal.SIGKILL).returncode == -signal.SIGKILL

    assert answer(ferry_here("clean", out, "--json"))["removed"] == [str(out / ".ferry")]
    assert list(out.iterdir()) == []
    assert answer(ferry_here("clean", out, "--json"))["removed"] == []
