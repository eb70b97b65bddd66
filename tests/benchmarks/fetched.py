"""What one device of a training run fetches of a checkpoint, with Ferry's chunks and with MaxText's.

    python -m tests.benchmarks.fetched

Nothing is timed and no weights are read: shapes and chunks come from `ferry plan` of sparse checkpoints at their true
sizes, shards from the real MaxText, and a chunk is fetched whole by every device that needs any of it. The table is
quoted in docs/reference/benchmarks.md.
"""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench import WORK
from tests.benchmarks.contest import FERRY, HERE, MAXTEXT_PYTHON
from tests.benchmarks.inputs import full_size_deepseek, make_sparse
from tests.support.family import published

Shape = tuple[int, ...]
WRITERS = 16
"""Devices that MaxText simulates where it converts, unless told otherwise."""
READERS = (("fsdp", 16), ("fsdp", 64), ("expert", 16), ("expert", 64))
WIDTH = 2
"""Bytes of a bfloat16."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Fetched:
    """By one device on average: bytes of its shards, bytes of the chunks that they lie in, and how many those are."""

    wanted: float = 0
    nbytes: float = 0
    chunks: float = 0

    def add(self, shape: Shape, parts: Shape, chunk: Shape) -> None:
        met = math.prod(_chunks_met(*axis) for axis in zip(shape, parts, chunk, strict=True))
        self.wanted += math.prod(shape) / math.prod(parts) * WIDTH
        self.nbytes += met * math.prod(chunk) * WIDTH
        self.chunks += met


def _chunks_met(extent: int, parts: int, chunk: int) -> float:
    """How many chunks along an axis a shard meets, on average over the shards."""
    size = extent // parts
    return sum(-(-(start + size) // chunk) - start // chunk for start in range(0, extent, size)) / parts


def maxtext_chunk(shape: Shape) -> Shape:
    """A shard of MaxText's conversion: of axis 0 where 16 divides it, else of axis 1, else the whole array.

    As MaxText 0.2.5 was seen to write it; arrays whose shards pass 2 GiB are cut further, which is left out here.
    """
    chunk = list(shape)
    for axis, extent in enumerate(shape[:2]):
        if extent % WRITERS == 0:
            chunk[axis] //= WRITERS
            break
    return tuple(chunk)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Where the sparse checkpoints are made.")] = WORK,
) -> None:
    """Prints the table."""
    table = Table("model", "sharded by", "devices", "shards", "ferry's chunks", "MaxText's chunks")
    for model, source in sparse_models(work):
        plan = _json([FERRY, "plan", source, "--json"])
        ours = {array["path"].removeprefix("params/params/"): array for array in plan["arrays"]}
        for axis, devices in READERS:
            if axis == "expert" and not model.startswith("deepseek"):
                continue
            shards = _json([MAXTEXT_PYTHON, HERE / "maxtext_shards.py", model, devices, axis])
            ferry, maxtext = Fetched(), Fetched()
            for path, array in ours.items():
                shape = tuple(array["shape"])
                parts = _parts(shards, path, shape)
                ferry.add(shape, parts, tuple(array["chunk_shape"]))
                maxtext.add(shape, parts, maxtext_chunk(shape))
            table.add_row(model, axis, str(devices), f"{ferry.wanted / 1e9:.2f} GB", _cell(ferry), _cell(maxtext))
    Console(width=120).print(table, highlight=False)


def sparse_models(work: Path) -> list[tuple[str, Path]]:
    """Checkpoints by MaxText's names of their models."""
    qwen = published("qwen3-8b").config
    return [
        ("qwen3-8b", make_sparse(qwen, work / "qwen3-8b-sparse", 5)),
        ("deepseek3-671b", full_size_deepseek(work)),
    ]


def _parts(shards: dict[str, Any], path: str, shape: Shape) -> Shape:
    """How MaxText cuts the parameter at `path`; it must have it in this shape."""
    found = shards[path]
    assert sorted(found["shape"]) == sorted(shape), f"{path}: {shape}, MaxText has {found['shape']}"
    return tuple(found["parts"])


def _cell(fetched: Fetched) -> str:
    return f"{fetched.nbytes / 1e9:.2f} GB in {fetched.chunks:,.0f} ({fetched.nbytes / fetched.wanted:.2f} x)"


def _json(command: list[object]) -> Any:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    app()
