"""Writes a Hugging Face checkpoint: safetensors shards with an index, slice by slice.

A shard's header is known from the plan, so files get their full size first and slices are written at their offsets,
in any order. (Format: https://huggingface.co/docs/safetensors.)
"""

from __future__ import annotations

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

from conversion_lib.boxes import Box
from conversion_lib.dtypes import SAFETENSORS_NAMES
from conversion_lib.files import disk_error, sync_directory, write_atomically
from conversion_lib.plan import Plan
from conversion_lib.sources.base import Array
from conversion_lib.sources.safetensors import INDEX_NAME


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint: its header's bytes, and where each array of the plan begins in it."""

    name: str
    header: bytes
    offsets: dict[int, int]
    nbytes: int


class SafetensorsSink:
    """Writes the arrays of `plan` into `directory`; `shard_of` gives the file name for an array's path."""

    def __init__(self, directory: Path, plan: Plan, shard_of: dict[str, str]) -> None:
        self._directory, self._plan, self._shard_of = directory, plan, shard_of
        self._shards = _lay_out(plan, shard_of)
        self._place = {number: shard for shard in self._shards for number in shard.offsets}
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
        shard, plan = self._place[array], self._plan.arrays[array]
        row = math.prod(plan.shape[1:]) * data.itemsize
        first = box[0][0] if box else 0
        offset = shard.offsets[array] + first * row
        return SliceWrite(self._files[shard.name], offset, data, f"{self._directory / shard.name}: tensor {plan.path}")

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
    """Rows of one tensor."""

    def __init__(self, fd: int, offset: int, data: Array, what: str) -> None:
        self._fd, self._offset, self._data, self._what = fd, offset, data, what
        self._started = False

    def start(self) -> None:
        view, done = self._data.reshape(-1).view(np.uint8).data, 0
        with self._outside():
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], self._offset + done)
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


def _lay_out(plan: Plan, shard_of: dict[str, str]) -> list[Shard]:
    """The shards, arrays in the plan's order within each."""
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
            "shape": list(array.shape),
            "data_offsets": [offsets[number], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format's own writer has it
    header = struct.pack("<Q", len(text)) + text
    return Shard(name, header, {number: len(header) + at for number, at in offsets.items()}, len(header) + end)
