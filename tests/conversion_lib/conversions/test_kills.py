"""Conversions that are killed with SIGKILL again and again: while they write, merge and commit.

A run is stopped, looked at and then killed, so that what it had done by then is known. Moments while it writes are
chosen by bytes done; those after that are every kind of system call that an undisturbed run makes from its last
journal line to its end, one kill just before each.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.checkpoints import QWEN3, WRITTEN, command, ferry, incompressible_tensors, write_checkpoint
from tests.support.faults import Fault, Run, build_shim
from tests.support.sparse_checkpoints import llama_tensors

MIB = 1 << 20
BUDGET = 64 * MIB
OVERHEAD = 1.05
"""Bytes on disk, and bytes written, for each byte of payload, where nothing disturbs."""
IN_FLIGHT = BUDGET // 2
"""Bytes that a kill while writing may cost: buffers never hold more than half of the budget."""
GROUP = BUDGET // 4
"""Bytes of a group at most: an eighth of the budget, and the piece that makes it full. A kill while writing costs no
more than one in the mean, and leaves no more than one on disk: of a group that was written twice, the first data file
stays where any value in it was not. Measured: 0.05 MB after 50 kills, 16 of them while writing; 6.3 MB after 3."""
FINISHING = MIB
"""Bytes of the merge and the commit that are written again after a kill there."""

CONFIG = QWEN3 | {
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "vocab_size": 12_000,
}
DATA_KILLS = 15
STORAGES = [("--no-ocdbt",), ("--no-zarr3",), ("--pathways",)]


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """0.26 GB that zstd cannot make smaller: so bytes stored can be held against the payload."""
    tensors = incompressible_tensors(llama_tensors(CONFIG))
    return write_checkpoint(tmp_path_factory.mktemp("source"), CONFIG, tensors, shards=4)


def convert(source: Path, destination: Path, storage: tuple[str, ...]) -> list[str]:
    return command(
        "convert", source, destination, *storage, "--memory-budget", BUDGET, "--threads", 2, "--json", "--quiet"
    )


@dataclass
class Undisturbed:
    """A conversion in one go: its answer, the bytes that it wrote, and the calls from its last journal line on."""

    path: Path
    answer: dict[str, Any]
    written: int
    moments: list[tuple[str, str]]


def undisturbed(source: Path, at: Path, shim: Path, storage: tuple[str, ...]) -> Undisturbed:
    out = at / "undisturbed"
    run = Run(convert(source, out, storage), shim, Fault("remove", f"{out}/.ferry"), log=at / "calls")
    run.wait_until_stopped()
    written = run.written
    run.go_on()
    result = run.end()
    assert result.returncode == 0, result.stderr
    return Undisturbed(out, json.loads(result.stdout), written, finishing_moments(at / "calls", out))


def finishing_moments(log: Path, out: Path) -> list[tuple[str, str]]:
    """Kinds of calls that are made only after the last journal line, in order: call, and a pattern below `out`."""
    calls = []
    for line in log.read_text().splitlines():
        call, path = line.split(" ", 1)
        if path.startswith(str(out)):
            below = path.removeprefix(str(out))
            # the names of TensorStore's data files and of temporary files are random, and arrays are many
            below = re.sub(r"\b[0-9a-f]{8,32}\b", "*", below)
            calls.append((call, re.sub(r"/params\..*", "/params.*", below)))
    last = max(
        place
        for place, (call, path) in enumerate(calls)
        if call == "sync" and re.fullmatch(r"/\.ferry/journal[^/]*", path)
    )
    before = set(calls[:last])
    return [moment for moment in dict.fromkeys(calls[last + 1 :]) if moment not in before]


def journaled(out: Path) -> int:
    """Bytes of payload that the journals say are committed, whole lines alone."""
    total = 0
    for path in (out / ".ferry").glob("journal*.jsonl"):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                boxes = [box for _, box in json.loads(line)["pieces"]]
                total += sum(int(np.prod([stop - start for start, stop in box])) * 2 for box in boxes)
    return total


@dataclass
class Killed:
    """A conversion that is killed over and over: what each run had written when it was, and what was journaled."""

    arguments: list[str]
    out: Path
    shim: Path
    written: list[int] = field(default_factory=list)
    journal: list[int] = field(default_factory=lambda: [0])

    def after(self, nbytes: int, delay: float) -> None:
        """Killed `delay` seconds after at least `nbytes` have been journaled."""
        run = Run(self.arguments, self.shim)
        while run.process.poll() is None and journaled(self.out) < nbytes:
            time.sleep(0.003)
        time.sleep(delay)
        run.stop()
        self.note(run)
        assert [path.name for path in self.out.iterdir()] == [".ferry"], "nobody sees half a checkpoint"

    def at(self, call: str, below: str) -> None:
        """Killed just before the first such call."""
        run = Run(self.arguments, self.shim, Fault(call, f"{self.out}{below}"))
        run.wait_until_stopped()
        self.note(run)
        if (self.out / "0").exists():
            inside = {path.name for path in (self.out / "0").iterdir()}
            assert inside == {"items", "_CHECKPOINT_METADATA", "commit_success.txt"}
            assert {path.name for path in self.out.iterdir()} <= {*WRITTEN, ".ferry"}

    def note(self, run: Run) -> None:
        self.written.append(run.written)
        if not (self.out / "0").exists():
            self.journal.append(journaled(self.out))
            assert self.journal[-1] >= self.journal[-2], "what was journaled stays journaled"
        run.kill()

    def finish(self) -> dict[str, Any]:
        run = Run(self.arguments, self.shim, Fault("remove", f"{self.out}/.ferry"))
        run.wait_until_stopped()
        self.written.append(run.written)
        run.go_on()
        result = run.end()
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


def size_of(directory: Path) -> int:
    """Bytes that the files below take on disk."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def names_in(directory: Path) -> list[str]:
    """What there is below, but for the data files' random names."""
    names = (str(path.relative_to(directory)) for path in directory.rglob("*"))
    return sorted({re.sub(r"\b[0-9a-f]{32}\b", "*", name) for name in names})


def assert_as_undisturbed(killed: Killed, whole: Undisturbed, while_writing: int) -> None:
    """The same bits as in one go, the same files, and little written twice. The kills while writing came first."""
    payload = whole.answer["bytes_out"]
    assert size_of(whole.path) <= OVERHEAD * payload
    assert whole.written <= OVERHEAD * payload
    for place, written in enumerate(killed.written[:while_writing]):
        assert written <= killed.journal[place + 1] - killed.journal[place] + IN_FLIGHT, "what was journaled is skipped"
    again = sum(killed.written) - whole.written
    assert again <= while_writing * GROUP + (len(killed.written) - while_writing) * FINISHING

    compared = ferry("compare", killed.out, whole.path, "--json")
    assert json.loads(compared.stdout)["same"], compared.stdout
    assert names_in(killed.out) == names_in(whole.path)
    assert not [name for name in names_in(killed.out) if name.endswith((".__lock", ".tmp"))]
    assert size_of(killed.out) <= size_of(whole.path) + while_writing * GROUP


def test_killed_all_the_way(tmp_path, source, shim):
    """One conversion, killed while it opens, while it writes, and at each step of the merge and of the commit."""
    whole = undisturbed(source, tmp_path, shim, ())
    payload = whole.answer["bytes_out"]
    killed = Killed(convert(source, tmp_path / "out", ()), tmp_path / "out", shim)
    killed.at("sync", "/.ferry/0/items/ocdbt.process_0/manifest.ocdbt*")
    chance = random.Random(0)
    for number in range(1, DATA_KILLS + 1):
        killed.after(payload * number // (DATA_KILLS + 1), chance.uniform(0, 0.03))
    while_writing = len(killed.written)
    for moment in whole.moments:
        killed.at(*moment)
    assert len(killed.written) > while_writing + 20, "the merge and the commit have so many steps at least"
    last = killed.finish()
    assert last["already"], "the last kills come when everything is in place"
    assert last["fingerprint"] == whole.answer["fingerprint"]
    assert_as_undisturbed(killed, whole, while_writing)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage[0])
def test_killed_in_every_storage(tmp_path, source, shim, storage):
    """A few kills while it writes, then at every sixth step of its end."""
    whole = undisturbed(source, tmp_path, shim, storage)
    payload = whole.answer["bytes_out"]
    killed = Killed(convert(source, tmp_path / "out", storage), tmp_path / "out", shim)
    for number in (1, 2, 3):
        killed.after(payload * number // 4, 0.01)
    for moment in whole.moments[::6]:
        killed.at(*moment)
    killed.finish()
    assert_as_undisturbed(killed, whole, while_writing=3)


def test_what_a_resumed_run_says(tmp_path, source, shim):
    """It skips, to the byte, what the journal has, and does the rest."""
    payload = json.loads(ferry("plan", source, "--json").stdout)["bytes_out"]
    killed = Killed(convert(source, tmp_path / "out", ()), tmp_path / "out", shim)
    for number in (1, 2):
        killed.after(payload * number // 3, 0)
    answer = killed.finish()
    assert answer["pieces_skipped"] > 0
    assert answer["bytes_out"] == payload - killed.journal[-1]
