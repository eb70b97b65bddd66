"""Writes a Hugging Face checkpoint: safetensors shards with an index, slice by slice.

A shard's header follows from the plan. So files get their full size first, and slices are written at their offsets in
any order. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.core.boxes import Box, Shape, box_shape
from conversion_lib.core.dtypes import SAFETENSORS_NAMES
from conversion_lib.core.tensors import Array
from conversion_lib.plan.chunking import run_axis
from conversion_lib.plan.plan import Plan
from conversion_lib.sources.weight_files import INDEX_NAME
from conversion_lib.storage.files import disk_error, sync_directory, write_atomically


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint.

    Attributes:
        name: The file's name.
        header: The bytes of the length field and the header.
        offsets: For the index of an array in the plan, the offset of its first byte in the file.
        nbytes: The size of the file.
    """

    name: str
    header: bytes
    offsets: dict[int, int]
    nbytes: int


class SafetensorsSink:
    """Writes the arrays of a plan as safetensors files.

    Args:
        directory: The directory of the files; `open` creates it.
        plan: The plan. A piece may be any box of an array.
        shard_of: The file name by an array's path.
    """

    def __init__(self, directory: Path, plan: Plan, shard_of: dict[str, str]) -> None:
        self._directory, self._plan, self._shard_of = directory, plan, shard_of
        self._shards = _lay_out(plan, shard_of)
        self._shard = {number: shard for shard in self._shards for number in shard.offsets}
        self._files: dict[str, int] = {}

    def open(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for shard in self._shards:
            try:
                fd = os.open(self._directory / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
                self._files[shard.name] = fd
                os.pwrite(fd, shard.header, 0)
                os.truncate(fd, shard.nbytes)
            except OSError as error:
                raise disk_error(error, "opening the destination's files failed") from error

    def write(self, array: int, box: Box, data: Array) -> SliceWrite:
        shard, plan = self._shard[array], self._plan.arrays[array]
        what = f"{self._directory / shard.name}: tensor {plan.path}"
        runs = list(_runs(plan.shape, box, shard.offsets[array], data.itemsize))
        return SliceWrite(self._files[shard.name], runs, data, what)

    def finish(self) -> None:
        for fd in self._files.values():
            os.fsync(fd)
            os.close(fd)
        self._files = {}
        if len(self._shards) > 1 or self._shards[0].name != "model.safetensors":
            total = self._plan.bytes_out
            weight_map = {array.path: self._shard_of[array.path] for array in self._plan.arrays}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_atomically(self._directory / INDEX_NAME, json.dumps(index, indent=2).encode())
        sync_directory(self._directory)


class SliceWrite:
    """A write of a box of one tensor.

    Args:
        fd: The open file.
        runs: The offsets in the file of the contiguous runs of the box, which are all equally long.
        data: The elements.
        what: The file and the tensor, for messages.
    """

    def __init__(self, fd: int, runs: list[int], data: Array, what: str) -> None:
        self._fd, self._runs, self._data, self._what = fd, runs, data, what
        self._started = False

    def start(self) -> None:
        view = self._data.reshape(-1).view(np.uint8).data
        length = len(view) // max(len(self._runs), 1)
        with self._outside():
            for number, offset in enumerate(self._runs):
                _write_run(self._fd, view[number * length : (number + 1) * length], offset)
        self._started = True

    def done(self) -> bool:
        return self._started

    def wait(self) -> None:
        if not self._started:
            self.start()
        with self._outside():
            os.fdatasync(self._fd)

    @contextmanager
    def _outside(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(error, f"{self._what}: writing failed") from error


def _runs(shape: Shape, box: Box, start: int, width: int) -> Iterator[int]:
    """Yields the offsets of a box's contiguous runs, all equally long; the tensor's first byte is at `start`."""
    wanted = box_shape(box)
    axis = run_axis(shape, wanted)
    strides = [math.prod(shape[dim + 1 :]) * width for dim in range(len(shape))]
    first = start + sum(low * stride for (low, _), stride in zip(box, strides, strict=True))
    for index in itertools.product(*(range(extent) for extent in wanted[:axis])):
        yield first + sum(step * stride for step, stride in zip(index, strides, strict=False))


def _write_run(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _lay_out(plan: Plan, shard_of: dict[str, str]) -> list[Shard]:
    """Returns the shards by name. Within a shard, the arrays are in the plan's order."""
    members: dict[str, list[int]] = {}
    for number, array in enumerate(plan.arrays):
        members.setdefault(shard_of[array.path], []).append(number)
    return [_shard(name, numbers, plan) for name, numbers in sorted(members.items())]


def _shard(name: str, numbers: list[int], plan: Plan) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for number in numbers:
        array = plan.arrays[number]
        offsets[number] = end
        end += array.nbytes
        entries[array.path] = {
            "dtype": SAFETENSORS_NAMES[array.dtype],
            "shape": list(array.stored_shape or array.shape),
            "data_offsets": [offsets[number], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8, as with the format's own writer
    header = struct.pack("<Q", len(text)) + text
    return Shard(name, header, {number: len(header) + at for number, at in offsets.items()}, len(header) + end)
