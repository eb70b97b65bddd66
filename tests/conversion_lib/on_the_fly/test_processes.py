"""Several real processes that ask for the same checkpoint at once, with the one that converts killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.on_the_fly.output import Output
from tests.support.checkpoints import QWEN3, ferry_here, random_tensors, write_checkpoint
from tests.support.faults import Fault, build_shim
from tests.support.sparse_checkpoints import llama_tensors

PROCESS = """
import json, sys
from conversion_lib.errors import FerryError
from conversion_lib.on_the_fly import ensure_checkpoint
try:
    print(json.dumps({"path": str(ensure_checkpoint(**json.loads(sys.argv[1])))}))
except FerryError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""
CONFIG = QWEN3 | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4000}
PATHWAYS = {"checkpoint_storage_use_ocdbt": False, "checkpoint_storage_use_zarr3": False}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), CONFIG, random_tensors(llama_tensors(CONFIG)))


class Job:
    """A process that asks for a checkpoint. stopped_at: a system call of its conversion, which then stands still."""

    def __init__(
        self, source: Path, out: Path, shim: Path | None = None, stopped_at: Fault | None = None, **settings: Any
    ):
        asked = {"model": str(source), "output_directory": str(out), **settings}
        environment = dict(os.environ)
        if stopped_at is not None:
            environment |= {"LD_PRELOAD": str(shim), "FERRY_FAULT": str(stopped_at), "HF_TOKEN": "hf_secret"}
            environment |= {"JAX_PLATFORMS": "proxy", "JAX_BACKEND_TARGET": "grpc://pathways:29000"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, json.dumps(asked)], text=True, env=environment, **pipes
        )

    def stopped_conversion(self) -> int:
        """The process id of its conversion, once that has been stopped."""
        for _ in range(6000):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for child in children:
                if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    return int(child)
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        raise AssertionError("the conversion was not stopped")

    def end(self) -> tuple[dict[str, str], str]:
        """What it answered, and its standard error."""
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, err
        return json.loads(out), err


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        if job.process.poll() is None:
            job.process.kill()
            job.process.communicate()


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def journal_is_begun(out: Path) -> Fault:
    """The moment when everything is written and journaled, and the checkpoint about to be finished."""
    return Fault("sync", f"{out}/.ferry/0/items/._METADATA*")


def chunk_files(out: Path) -> dict[str, int]:
    """When each stored chunk was written, by its name."""
    root = next(path for path in (out / "0", out / ".ferry" / "0") if path.is_dir()) / "items"
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.glob("params.*/*") if p.name[0].isdigit()}


def test_one_of_several_converts(source: Path, tmp_path: Path, jobs: list[Job]) -> None:
    jobs += [Job(source, tmp_path / "out") for _ in range(4)]
    ends = [job.end() for job in jobs]
    assert [answer for answer, _ in ends] == [{"path": str(tmp_path / "out/0/items")}] * 4
    assert sum(err.count("convert: ") for _, err in ends) == 1
    assert ferry_here("convert", source, tmp_path / "plain", "--quiet").returncode == 0
    assert ferry_here("compare", tmp_path / "out", tmp_path / "plain").returncode == 0
    assert not (tmp_path / "out" / ".ferry").exists()


def test_a_conversion_that_is_killed(source: Path, tmp_path: Path, shim: Path, jobs: list[Job]) -> None:
    """Its parent says how it died, whoever waits takes over, and goes on from what was written."""
    out = tmp_path / "out"
    first = Job(source, out, shim, journal_is_begun(out), **PATHWAYS)
    jobs.append(first)
    conversion = first.stopped_conversion()
    written = chunk_files(out)
    assert len(written) > 10

    environment = Path(f"/proc/{conversion}/environ").read_bytes().split(b"\0")
    assert b"JAX_PLATFORMS=cpu" in environment and b"CUDA_VISIBLE_DEVICES=" in environment
    assert not [line for line in environment if b"pathways" in line]
    assert b"HF_TOKEN=hf_secret" in environment
    assert b"hf_secret" not in Path(f"/proc/{conversion}/cmdline").read_bytes()

    second = Job(source, out, **PATHWAYS)
    jobs.append(second)
    late, _ = Job(source, out, may_convert=False, wait_seconds=0.5, **PATHWAYS).end()
    assert late["error"] == "OutsideFailure"
    assert f"process {first.process.pid} on " in late["text"] and "not committed within 0 s" in late["text"]

    os.kill(conversion, signal.SIGKILL)
    answer, err = first.end()
    assert answer["error"] == "OutsideFailure"
    assert "exit code -9, SIGKILL; its last lines: " in answer["text"] and "next start resumes" in answer["text"]
    assert "hf_secret" not in err
    assert second.end()[0] == {"path": str(out / "0" / "items")}
    assert chunk_files(out) == written, "no chunk that had been journaled was written again"


def test_a_parent_that_is_killed(source: Path, tmp_path: Path, shim: Path, jobs: list[Job]) -> None:
    """Its conversion ends with it, and the next start takes over."""
    out = tmp_path / "out"
    first = Job(source, out, shim, journal_is_begun(out))
    jobs.append(first)
    conversion = first.stopped_conversion()
    first.process.kill()
    first.process.communicate()
    os.kill(conversion, signal.SIGCONT)
    for _ in range(3000):
        if not is_running(conversion):
            break
        time.sleep(0.02)
    assert not is_running(conversion)
    assert Job(source, out).end()[0] == {"path": str(out / "0" / "items")}


def test_what_cannot_be_converted_fails_for_all_at_once(tmp_path: Path, jobs: list[Job]) -> None:
    broken = random_tensors(llama_tensors(QWEN3))
    del broken["model.norm.weight"]
    source = write_checkpoint(tmp_path / "source", QWEN3, broken)
    jobs += [Job(source, tmp_path / "out", wait_seconds=60, may_convert=number > 0) for number in range(3)]
    answers = [job.end()[0] for job in jobs]
    assert {answer["error"] for answer in answers} == {"BadInput"}
    assert all("tensor model.norm.weight is missing" in answer["text"] for answer in answers)


def test_bad_input_in_the_second_try_is_not_that_of_the_first(source: Path, tmp_path: Path) -> None:
    """What a failed conversion left is not taken for the failure of the next."""
    lease = Output(tmp_path / "out").lease(lambda: None)
    assert lease.acquire()
    lease.release(failure="an old one", final=True)
    assert Job(source, tmp_path / "out").end()[0] == {"path": str(tmp_path / "out/0/items")}
