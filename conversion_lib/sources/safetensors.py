"""Reads safetensors files: headers are parsed once, slices are read by offset and length.

A file has an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes, row-major
(https://huggingface.co/docs/safetensors, "Format"). Files are read with plain positional reads, because a memory map on
a network mount is many times slower, and the safetensors package cannot read fp8 into numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion_lib.core.boxes import Box, box_shape, whole
from conversion_lib.core.dtypes import SAFETENSORS_DTYPES, numpy_dtype
from conversion_lib.core.tensors import Array, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.sources.files import MAX_HEADER, Files, LocalFiles, ReadRun, Shard

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
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

    Raises:
        BadInput: A shard is missing, truncated or malformed, or does not have a tensor that the index says it has.
        OSError: A local file cannot be read.
    """

    def __init__(self, where: Path | Files) -> None:
        self.files = where if isinstance(where, Files) else LocalFiles(where)
        index = _index(self.files)
        self.shards: list[Shard] = []
        self.tensors: Mapping[str, TensorInfo]
        tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, TensorOffset] = {}
        self._header_hash = hashlib.sha256()
        for shard in _shard_names(self.files, index):
            for name, info, offset, _ in self._read_header(shard):
                if name in tensors and index.get(name) != shard:
                    continue
                tensors[name] = info
                self._offsets[name] = TensorOffset(shard, offset)
        for name, shard in index.items():
            if name not in tensors or self._offsets[name].file != shard:
                raise BadInput(f"{self.files.name}/{INDEX_NAME} names tensor {name} in {shard}, which does not have it")
        self.tensors = tensors

    @property
    def header_digest(self) -> str:
        """The hexadecimal SHA-256 of the names and headers of all shards: names, shapes, dtypes and offsets."""
        return self._header_hash.hexdigest()

    def offset_of(self, name: str) -> TensorOffset:
        """Returns the tensor's file and its offset in bytes."""
        return self._offsets[name]

    def _read_header(self, name: str) -> list[tuple[str, TensorInfo, int, int]]:
        shard, start = self.files.header(name)
        self.shards.append(shard)
        file = f"{self.files.name}/{name}"
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 0 < length <= min(MAX_HEADER, max(shard.size - 8, 0)) or len(start) < 8 + length:
            raise BadInput(
                f"{file} is truncated or not a safetensors file: {shard.size} bytes, no whole header. Download it again"
            )
        self._header_hash.update(name.encode())
        self._header_hash.update(start)
        try:
            header = json.loads(start[8:])
            found = [_entry(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{file} has a header that is not in safetensors format: {error}") from None
        end = max([stop for *_, stop in found], default=8 + length)
        if end != shard.size:
            state = "truncated" if shard.size < end else "longer than its header says"
            raise BadInput(f"{file} is {state}: {shard.size} bytes, expected {end}. Download it again")
        return found

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


def shard_names(files: Files) -> list[str]:
    """Returns the weight files of a checkpoint, in name order.

    Raises:
        BadInput: There are none, the index is malformed, or a file that the index names is missing.
    """
    return _shard_names(files, _index(files))


def _shard_names(files: Files, index: dict[str, str]) -> list[str]:
    if index:
        names = sorted(set(index.values()))
        missing = [name for name in names if not files.has(name)]
        if missing:
            raise BadInput(
                f"{files.name}: shard {missing[0]} is missing ({len(missing)} of {len(names)}). Download it again"
            )
        return names
    if files.has(SINGLE_NAME):
        return [SINGLE_NAME]
    raise BadInput(f"{files.name} has neither {INDEX_NAME} nor {SINGLE_NAME}: only safetensors weights are read")


def _index(files: Files) -> dict[str, str]:
    """Returns the index's weight_map; empty if there is no index file."""
    path = f"{files.name}/{INDEX_NAME}"
    try:
        weight_map = dict(json.loads((files.directory / INDEX_NAME).read_bytes())["weight_map"].items())
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a safetensors index: {error}") from None
    shards = dict.fromkeys(name if isinstance(name, str) else repr(name) for name in weight_map.values())
    bad = next((shard for shard in shards if Path(shard).name != shard), None)
    if bad is not None or not weight_map:
        raise BadInput(f"{path}: weight_map should name files in the same directory, not {bad!r}")
    return weight_map


def _entry(file: str, name: str, entry: dict[str, Any], base: int) -> tuple[str, TensorInfo, int, int]:
    """Returns a tensor's name and header entry, its first byte in the file, and the byte after its last."""
    start, stop = entry["data_offsets"]
    code = entry["dtype"]
    if code not in SAFETENSORS_DTYPES:
        raise BadInput(f"{file}: tensor {name} has dtype {code}, which is not a known dtype")
    info = TensorInfo(name, tuple(entry["shape"]), SAFETENSORS_DTYPES[code], file)
    if stop - start != (nbytes := info.nbytes) or start < 0:
        raise BadInput(f"{file}: tensor {name} takes {stop - start} bytes, but its shape and dtype say {nbytes}")
    return name, info, base + start, base + stop


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
