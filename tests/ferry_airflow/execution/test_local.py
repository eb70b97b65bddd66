"""The execution mode `local`: real processes, with a script in ferry's stead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ferry_airflow.execution.base import StageFailed
from tests.ferry_airflow.conftest import SCRIPT, TASK, ferry


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def alive(pid):
    """Whether the process runs: a zombie that nobody reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_result_and_log_lines(fake, log):
    result = fake("echo").run(ferry("convert", "a b"), {}, TASK, log)
    assert result["arguments"] == ["convert", "a b", "--json"]
    assert log.lines == [
        ("info", "Running: ferry convert a b"),
        ("info", "one of two"),
        ("info", "two of two"),
    ]


def test_lines_come_as_they_are_written(fake, log, tmp_path):
    mode, pids = fake("slow"), tmp_path / "pids"

    def run():
        with pytest.raises(StageFailed):
            mode.run(ferry(str(pids)), {}, TASK, log)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: ("info", "started") in log.lines)  # while it still runs
    assert thread.is_alive()
    mode.kill()
    thread.join(20)


@pytest.mark.parametrize("code", [1, 2, 3, 143])
def test_exit_code_error_line_and_result_of_a_failure(fake, log, code):
    with pytest.raises(StageFailed, match=r"^ferry: model\.safetensors: no such tensor$") as caught:
        fake("fail").run(ferry(str(code)), {}, TASK, log)
    assert caught.value.exit_code == code
    assert caught.value.result == {"verdict": "fail", "max_kl": 0.5}
    assert log.lines[-1] == ("error", "ferry: model.safetensors: no such tensor")


def test_failure_without_a_word(fake, log):
    with pytest.raises(StageFailed, match=r"^ferry 9 ended with exit code 9; its last line: none$"):
        fake("silent").run(ferry("9"), {}, TASK, log)


def test_crash_is_no_failed_check(fake, log):
    with pytest.raises(StageFailed, match="ferry x ended with exit code 1; its last line: NameError: name") as caught:
        fake("crash").run(ferry("x"), {}, TASK, log)
    assert caught.value.exit_code == 3


def test_success_without_a_result_is_a_failure(fake, log):
    with pytest.raises(StageFailed, match="printed no JSON object") as caught:
        fake("silent").run(ferry("0"), {}, TASK, log)
    assert caught.value.exit_code == 3


def test_environment_has_secrets_but_not_airflows(fake, log, monkeypatch):
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://user:pass@host/db")
    monkeypatch.setenv("AIRFLOW_CONN_HUB", "http://:hf_other@hub")
    monkeypatch.setenv("AIRFLOW_CTX_DAG_ID", "onboard_checkpoint")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub")
    seen = fake("echo").run(ferry("x"), {"HF_TOKEN": "hf_secret"}, TASK, log)["environment"]
    assert seen["HF_TOKEN"] == "hf_secret"
    assert seen["HF_ENDPOINT"] == "http://hub"
    assert seen["AIRFLOW_CTX_DAG_ID"] == "onboard_checkpoint"
    assert not any(name.startswith(("AIRFLOW__", "AIRFLOW_CONN_")) for name in seen)
    assert "hf_secret" not in str(log.lines)


def run_and_kill(mode, pids, log):
    """Kills from a signal handler of the main thread, as Airflow does; returns error, pids and seconds."""
    started = []

    def signal_when_started():
        wait_for(pids.exists)
        started.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: mode.kill())
    threading.Thread(target=signal_when_started).start()
    try:
        with pytest.raises(StageFailed) as caught:
            mode.run(ferry(str(pids)), {}, TASK, log)
    finally:
        signal.signal(signal.SIGUSR1, before)
    return caught.value, json.loads(pids.read_text()), time.monotonic() - started[0]


def test_kill_ends_the_whole_group(fake, log, tmp_path):
    error, pids, seconds = run_and_kill(fake("slow", grace_seconds=10), tmp_path / "pids", log)
    assert error.exit_code == 143
    assert seconds < 5
    wait_for(lambda: not any(map(alive, pids)))


def test_kill_ends_what_does_not_listen(fake, log, tmp_path):
    error, pids, seconds = run_and_kill(fake("deaf", grace_seconds=0.5), tmp_path / "pids", log)
    assert error.exit_code == -signal.SIGKILL
    assert "was ended by Killed; its last line: started" in str(error)
    assert 0.4 < seconds < 5
    wait_for(lambda: not any(map(alive, pids)))


def test_kill_with_nothing_running(fake):
    fake("echo").kill()


def test_interrupted_run_leaves_nothing(fake, log, tmp_path):
    """A timeout of Airflow raises in the middle of `run`."""
    mode, pids = fake("slow", grace_seconds=1), tmp_path / "pids"

    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Thread(target=lambda: (wait_for(pids.exists), os.kill(os.getpid(), signal.SIGUSR1))).start()
    try:
        with pytest.raises(Interrupted):
            mode.run(ferry(str(pids)), {}, TASK, log)
    finally:
        signal.signal(signal.SIGUSR1, before)
    wait_for(lambda: not any(map(alive, json.loads(pids.read_text()))))


def test_child_that_stays_behind_does_not_hold_the_task(fake, log, tmp_path):
    assert fake("leaves_child").run(ferry(str(tmp_path / "pids")), {}, TASK, log) == {}
    (child,) = json.loads((tmp_path / "pids").read_text())
    wait_for(lambda: not alive(child))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_command_ends_with_a_killed_task(tmp_path):
    """The task's process is killed without a chance to clean up."""
    pids = tmp_path / "pids"
    program = (
        "import sys, logging; from ferry_airflow.execution.local import LocalSubprocess\n"
        "from tests.ferry_airflow.conftest import TASK, ferry\n"
        f"mode = LocalSubprocess([sys.executable, {str(SCRIPT)!r}, 'slow'])\n"
        f"mode.run(ferry({str(pids)!r}), {{}}, TASK, logging.getLogger())"
    )
    task = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    wait_for(pids.exists)
    task.kill()
    task.wait()
    leader, child = json.loads(pids.read_text())
    wait_for(lambda: not alive(leader))
    os.kill(child, signal.SIGKILL)  # Linux tells the leader only
