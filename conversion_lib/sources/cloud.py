"""A Hugging Face checkpoint in a bucket: its weights by ranged reads of one generation.

Blocks of a shard are asked for ahead of the pieces that need them, many at a time, and a few are kept in memory.
"""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import tensorstore as ts

from conversion_lib.errors import BadInput, OutsideFailure, tensorstore_reason
from conversion_lib.sources.files import Files, ReadRun, Shard, header_bytes
from conversion_lib.storage import gcs as cloud_place
from conversion_lib.storage.files import in_parallel
from conversion_lib.storage.gcs import BucketLocation

BLOCK_BYTES = 4 << 20
CACHE_SHARE = 16
"""Of the memory budget, what blocks may take: those that are kept, and those that are on their way."""
BESIDE = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*", "README.md")
"""Files that are fetched whole."""


@contextmanager
def in_bucket(url: str, memory_budget: int) -> Iterator[BucketFiles]:
    """The Hugging Face checkpoint at gs://bucket/prefix, for `convert` to read where it lies.

    Raises BadInput where there is no checkpoint.
    """
    place = BucketLocation.parse(url)
    objects = {name: blob for blob in place.blobs() if "/" not in (name := blob.name[len(place.name) + 1 :])}
    shards = [name for name in objects if name.endswith(".safetensors")]
    if not shards:
        raise BadInput(f"{url} holds no safetensors: give the prefix of a Hugging Face checkpoint, or a directory")
    beside = [name for name in objects if any(fnmatch(name, pattern) for pattern in BESIDE)]
    with tempfile.TemporaryDirectory(prefix="ferry-config-") as name:
        directory = Path(name)
        files = BucketFiles(place, directory, objects, memory_budget // CACHE_SHARE)

        def fetch(name: str, stopped: threading.Event) -> None:
            if name in beside:
                (directory / name).write_bytes((place / name).read() or b"")
            else:
                files.fetch_header(name)

        in_parallel(fetch, [*shards, *beside], threads=cloud_place.REQUESTS)
        again = {name: generation for name, _, generation in place.versions()}
        for name in [*shards, *beside]:
            if again.get(name) != objects[name].generation:
                raise _changed(place / name)
        yield files


def open_store(place: BucketLocation) -> Any:
    """TensorStore's store of the objects below."""
    return ts.KvStore.open(place.spec, context=ts.Context(cloud_place.TENSORSTORE_REQUESTS)).result()


def _result(future: Any, what: BucketLocation) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError) as error:
        raise OutsideFailure(f"reading {what} failed: {tensorstore_reason(error)}") from error


def _changed(what: BucketLocation) -> BadInput:
    return BadInput(f"{what} changed while it was read; run again when the source is at rest")


class BucketFiles(Files):
    """A Hugging Face checkpoint at `place`, of which only the small files are copied: into `directory`.

    An object's generation, a time in microseconds, stands for the time at which a file was written: an object that is
    written anew counts as changed.

    objects: as they are listed, by name. cache_bytes: what blocks may take of the memory.
    """

    def __init__(self, place: BucketLocation, directory: Path, objects: Mapping[str, Any], cache_bytes: int) -> None:
        self.name, self.directory = str(place), directory
        self._place, self._store, self._objects = place, open_store(place), objects
        self._headers: dict[str, bytes] = {}
        self._generations: dict[str, Any] = {}
        self._blocks: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._kept = max(4, cache_bytes // BLOCK_BYTES)

    def fetch_header(self, shard: str) -> None:
        """Reads the header of a shard, and notes which generation it is of."""
        self._headers[shard] = header_bytes(self._objects[shard].size, partial(self._first_bytes, shard))

    def has(self, shard: str) -> bool:
        return shard in self._headers

    def header(self, shard: str) -> tuple[Shard, bytes]:
        return Shard(shard, self._objects[shard].size, self.modified(shard)), self._headers[shard]

    def reader(self, shard: str) -> ReadRun:
        return partial(self._read_run, shard)

    def modified(self, name: str) -> int:
        return int(self._objects[name].generation) * 1000 if name in self._objects else 0

    def _first_bytes(self, name: str, count: int) -> bytes:
        result = _result(self._store.read(name, byte_range=slice(0, count)), self._place / name)
        generation = self._generations.setdefault(name, result.stamp.generation)
        if result.state != "value" or generation != result.stamp.generation:
            raise _changed(self._place / name)
        return bytes(result.value)

    def _read_run(self, name: str, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            number, start = divmod(offset + done, BLOCK_BYTES)
            part = memoryview(self._block(name, number))[start : start + len(view) - done]
            if not part:
                raise EOFError(f"the object ends at byte {offset + done}, expected {offset + len(view)}")
            view[done : done + len(part)] = part
            done += len(part)

    def _block(self, name: str, number: int) -> bytes:
        """One block; those after it are asked for as well, up to half of what is kept: there may be two readers."""
        with self._lock:
            last = min(number + self._kept // 4, (self._objects[name].size - 1) // BLOCK_BYTES)
            for ahead in range(last, number - 1, -1):
                self._ask(name, ahead)
            future = self._blocks[name, number]
        place = self._place / name
        result = _result(future, place)
        if result.state != "value" or result.stamp.generation != self._generations[name]:
            raise _changed(place)
        return bytes(result.value)

    def _ask(self, name: str, number: int) -> None:
        key, start = (name, number), number * BLOCK_BYTES
        if key not in self._blocks:
            stop = min(start + BLOCK_BYTES, self._objects[name].size)
            self._blocks[key] = self._store.read(name, byte_range=slice(start, stop))
        self._blocks.move_to_end(key)
        while len(self._blocks) > self._kept:
            self._blocks.popitem(last=False)
