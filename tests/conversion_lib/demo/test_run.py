"""`ferry demo`: refusals and figures here; the whole of it once, as a person would run it."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from conversion_lib.demo import run
from conversion_lib.demo.run import DemoResult, StageFigures, run_demo, summary
from conversion_lib.errors import BadInput, CheckFailed, OutsideFailure
from conversion_lib.progress import SILENT


class Sayings:
    """A Reporter that remembers."""

    def __init__(self):
        self.lines = []

    def say(self, message):
        self.lines.append(message)


def manifest(stage, **more):
    return {"stage": stage, "seconds": 1.25, "bytes_in": 1000, "bytes_out": 2000, "peak_bytes": 3_000_000, **more}


@pytest.mark.parametrize("package", ["airflow", "torch"])
def test_missing_extra_says_what_to_install(tmp_path, monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(BadInput, match=rf"{package}.*pip install 'ferry-checkpoints\[airflow,check\]'"):
        run_demo(tmp_path / "demo", SILENT)
    assert not (tmp_path / "demo").exists()


def test_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="was not made by a demo"):
        run_demo(tmp_path, SILENT)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_stages_are_told_once_as_they_end():
    reporter = Sayings()
    told = run._tell_news({"resolve": manifest("resolve", peak_bytes=None)}, {}, reporter)
    told = run._tell_news({**told, "download": manifest("download", error="ferry: lost", exit_code=3)}, told, reporter)
    told = run._tell_news({**told, "download": manifest("download")}, told, reporter)
    assert [line.split()[:2] for line in reporter.lines] == [["✓", "resolve"], ["✗", "download"], ["✓", "download"]]
    assert reporter.lines[1].endswith("lost (Airflow retries it)")
    assert "3.0 MB peak" in reporter.lines[2]


def test_failure_names_stage_error_and_log(tmp_path):
    whole = {stage: manifest(stage) for stage in run.STAGES}
    run._require_success(0, whole, tmp_path / "log")
    failed = {**whole, "check": manifest("check", error="ferry: KL is 3", exit_code=1)}
    with pytest.raises(CheckFailed, match=r"stage check: KL is 3 \(log: .*log\)"):
        run._require_success(1, failed, tmp_path / "log")
    with pytest.raises(OutsideFailure, match="did not succeed"):
        run._require_success(1, whole, tmp_path / "log")
    with pytest.raises(OutsideFailure, match="did not succeed"):
        run._require_success(0, {"resolve": manifest("resolve")}, tmp_path / "log")


def test_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = [StageFigures.model_validate(manifest(stage)) for stage in run.STAGES]
    inside = str(tmp_path / "published" / "x")
    result = DemoResult(stages=figures, max_kl=1.5e-9, checkpoint=inside, report="/elsewhere/report.html", seconds=47.6)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*summary(result), sep="\n")
    text = console.export_text()
    for expected in ("dequantize", "2.0 kB", "1.50e-09", "Checkpoint: published/x", "/elsewhere/report.html", "48 s"):
        assert expected in text


def test_demo_as_a_person_runs_it(tmp_path):
    """Over the leftovers of another demo, which was stopped."""
    left = tmp_path / ".demo"
    (left / "work").mkdir(parents=True)
    (left / run.MARKER).touch()
    (left / "work" / "stale").write_text("of another time")
    command = [sys.executable, "-m", "conversion_lib", "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout)
    result = DemoResult.model_validate({name: answer[name] for name in DemoResult.model_fields})
    assert [figures.stage for figures in result.stages] == list(run.STAGES)
    assert result.max_kl < 1e-5
    assert os.path.isfile(result.report)
    assert os.path.isfile(os.path.join(result.checkpoint, "0", "items", "_METADATA"))
    assert result.checkpoint.startswith(str(left))
    assert done.stderr.count("✓") == len(run.STAGES)
    assert not (left / "work" / "stale").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc")
def test_interrupted_demo_leaves_no_process(tmp_path):
    """Neither Airflow nor the stage's ferry command, here that of the longest stage."""
    command = [sys.executable, "-m", "conversion_lib", "demo"]
    demo = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        until(lambda: [pid for pid in processes_of(tmp_path) if "steps.redo check" in command_line(pid)])
        demo.send_signal(signal.SIGINT)
        assert demo.wait(30) != 0
        until(lambda: not processes_of(tmp_path))
    finally:
        demo.kill()
        demo.wait()


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
    return value


def processes_of(directory):
    """Processes whose command line names the demo's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and str(directory) in command_line(entry.name):
            found.append(entry.name)
    return found


def command_line(pid):
    try:
        return (Path("/proc") / pid / "cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
