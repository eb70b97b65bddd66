"""Reads safetensors files: headers are parsed once, slices are read by offset and length.

Files are read with plain positional reads, because a memory map on a network mount is many times slower, and the
safetensors package cannot read fp8 into numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion_lib.core.boxes import Box, box_shape, whole
from conversion_lib.core.dtypes import numpy_dtype
from conversion_lib.core.tensors import Array, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.sources.files import Files, LocalFiles, ReadRun, Shard
from conversion_lib.sources.safetensors_header import Entry, parse_header
from conversion_lib.sources.weight_files import INDEX_NAME, WeightFiles, weight_files

COVER_BYTES = 2 << 20
"""Bytes, about, of whole rows that are read at once to keep some of their columns."""


class TensorOffset(NamedTuple):
    """A tensor's file and the offset of its first byte in it."""

    file: str
    offset: int


class SafetensorsSource:
    """The tensors of a checkpoint with `model.safetensors.index.json`, or with a single `model.safetensors`.

    Args:
        where: A directory, or the files of a checkpoint.

    Attributes:
        shards: The weight files, in name order.
        tensors: What the headers say, by tensor name, in the order of the files.
        absent: Tensors that only the index has, each with the shard that it names.
        notes: A line for the files that are not read.

    Raises:
        BadInput: A shard is missing, truncated or malformed, or a tensor is not in the shard that the index says.
        OSError: A local file cannot be read.
    """

    def __init__(self, where: Path | Files) -> None:
        self.files = where if isinstance(where, Files) else LocalFiles(where)
        chosen = chosen_files(self.files)
        self.notes = chosen.notes
        self.shards: list[Shard] = []
        self.tensors: Mapping[str, TensorInfo]
        tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, TensorOffset] = {}
        self._header_hash = hashlib.sha256()
        for shard in chosen.names:
            for info, start, _ in self._read_header(shard):
                name = info.name
                if name in tensors and not self._is_the_one(name, shard, chosen.index):
                    continue
                tensors[name] = info
                self._offsets[name] = TensorOffset(shard, start)
        self.tensors = tensors
        self._require_where_it_says(chosen.index)
        self.absent: Mapping[str, str] = {name: file for name, file in chosen.index.items() if name not in tensors}

    def _require_where_it_says(self, index: Mapping[str, str]) -> None:
        for name, at in self._offsets.items():
            if (file := index.get(name, at.file)) != at.file:
                raise BadInput(
                    f"{self.files.name}/{INDEX_NAME} says that tensor {name} is in {file}, but it is in {at.file}: the "
                    "index and the shards are not of one checkpoint. Download them again"
                )

    def _is_the_one(self, name: str, shard: str, index: Mapping[str, str]) -> bool:
        """Whether the index has a tensor of two shards in this one. Raises BadInput where it has it in neither."""
        first = self._offsets[name].file
        if index.get(name) not in (first, shard):
            raise BadInput(
                f"{self.files.name}: tensor {name} is in {first} and in {shard}, and {INDEX_NAME} does not say which "
                "counts: remove one"
            )
        return index[name] == shard

    @property
    def header_digest(self) -> str:
        """The hexadecimal SHA-256 of the names and headers of all shards: names, shapes, dtypes and offsets."""
        return self._header_hash.hexdigest()

    def offset_of(self, name: str) -> TensorOffset:
        """Returns the tensor's file and its offset in bytes."""
        return self._offsets[name]

    def _read_header(self, name: str) -> list[Entry]:
        shard, start = self.files.header(name)
        self.shards.append(shard)
        entries = parse_header(f"{self.files.name}/{name}", shard.size, start)
        self._header_hash.update(name.encode())
        self._header_hash.update(start)
        return entries

    def read(self, name: str, box: Box | None = None) -> Array:
        info = self.tensors.get(name)
        if info is None:
            raise BadInput(f"{self.files.name} has no tensor {name}")
        at, box = self._offsets[name], box or whole(info.shape)
        dtype = numpy_dtype(info.dtype)
        try:
            return _read_box(self.files.reader(at.file), at.offset, info.shape, dtype, box)
        except (OSError, EOFError) as error:
            raise OutsideFailure(f"{self.files.name}/{at.file}: reading tensor {name} failed: {error}") from error

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        return (StoredSlice.of(self.tensors[name], box),)


def chosen_files(files: Files) -> WeightFiles:
    """Returns the weight files of a checkpoint. Raises BadInput as for `weight_files`."""
    try:
        index = (files.directory / INDEX_NAME).read_bytes()
    except FileNotFoundError:
        index = None
    return weight_files(files.name, files.weights(), index)


def _read_box(read: ReadRun, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], box: Box) -> Array:
    """Reads `box` of a row-major array whose first byte is at `offset`."""
    if len(shape) == 0:
        return _read_run(read, offset, 1, dtype).reshape(())
    wanted = box_shape(box)
    inner = math.prod(shape[1:])
    rows = slice(*box[0])
    if wanted[1:] == shape[1:]:
        return _read_run(read, offset + rows.start * inner * dtype.itemsize, wanted[0] * inner, dtype).reshape(wanted)
    result = np.empty(wanted, dtype)
    # a part of each row: read some whole rows at a time and cut them, unless the part is small
    if len(shape) == 2 and wanted[1] * 4 < shape[1] and wanted[1] * dtype.itemsize >= 512:
        for index, row in enumerate(range(rows.start, rows.stop)):
            result[index] = _read_run(read, offset + (row * inner + box[1][0]) * dtype.itemsize, wanted[1], dtype)
        return result
    columns = tuple(slice(start, stop) for start, stop in box[1:])
    step = max(1, COVER_BYTES // max(inner * dtype.itemsize, 1))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        block = _read_run(read, offset + start * inner * dtype.itemsize, (stop - start) * inner, dtype)
        kept = block.reshape(stop - start, *shape[1:])[(slice(None), *columns)]
        result[start - rows.start : stop - rows.start] = kept
    return result


def _read_run(read: ReadRun, offset: int, count: int, dtype: np.dtype[Any]) -> Array:
    """Reads `count` contiguous elements from `offset`. Raises EOFError if the file ends too early."""
    result = np.empty(count, dtype)
    read(offset, result.view(np.uint8).data)
    return result
