"""Reads a Hugging Face checkpoint in a bucket: ranged reads of one generation of each shard.

Blocks of a shard are requested before the pieces need them, many at a time. A few blocks stay in memory.
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
from conversion_lib.sources.files import Files, ReadRun, Shard
from conversion_lib.sources.safetensors import chosen_files
from conversion_lib.sources.safetensors_header import header_bytes
from conversion_lib.sources.weight_files import SUFFIX
from conversion_lib.storage import gcs
from conversion_lib.storage.files import in_parallel
from conversion_lib.storage.gcs import BucketLocation
from conversion_lib.storage.names import is_hidden, path_below, require_distinct, safe_part

BLOCK_BYTES = 4 << 20
CACHE_SHARE = 16
"""Blocks, both in memory and requested, may take one part in CACHE_SHARE of the memory budget."""
BESIDE = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*", "README.md")
"""Small files to fetch whole."""


@contextmanager
def in_bucket(url: str, memory_budget: int) -> Iterator[BucketFiles]:
    """Opens the Hugging Face checkpoint at gs://bucket/prefix for reading, without a copy of the weights.

    Args:
        url: gs://bucket/prefix.
        memory_budget: Bytes. Blocks take a sixteenth of it.

    Yields:
        The files. Copies of the small ones, such as config.json, are deleted at the end of the context.

    Raises:
        BadInput: There is no checkpoint at the URL, or an object changed during the read.
        OutsideFailure: A read failed.
    """
    location = BucketLocation.parse(url)
    below = {blob.name[len(location.spec["path"]) :]: blob for blob in location.blobs()}
    objects = {name: blob for name, blob in below.items() if name and "/" not in name and not is_hidden(name)}
    if not any(name.endswith(SUFFIX) for name in objects):
        raise BadInput(f"{url} has no safetensors files: give the prefix of a Hugging Face checkpoint, or a directory")
    beside = [name for name in objects if any(fnmatch(name, pattern) for pattern in BESIDE)]
    require_distinct((safe_part(name, url) for name in objects if name in beside or name.endswith(SUFFIX)), url)
    with tempfile.TemporaryDirectory(prefix="ferry-config-") as name:
        directory = Path(name)
        files = BucketFiles(location, directory, objects, memory_budget // CACHE_SHARE)

        def fetch(name: str, stopped: threading.Event) -> None:
            path_below(directory, name, url).write_bytes((location / name).read() or b"")

        def fetch_header(name: str, stopped: threading.Event) -> None:
            files.fetch_header(name)

        in_parallel(fetch, beside, threads=gcs.REQUESTS)
        shards = chosen_files(files).names
        in_parallel(fetch_header, shards, threads=gcs.REQUESTS)
        again = {name: generation for name, _, generation in location.versions()}
        for name in [*shards, *beside]:
            if again.get(name) != objects[name].generation:
                raise _changed(location / name)
        yield files


def open_store(location: BucketLocation) -> Any:
    """Opens the TensorStore key-value store of the objects under the prefix `location`."""
    return ts.KvStore.open(location.spec, context=ts.Context(gcs.TENSORSTORE_REQUESTS)).result()


def _result(future: Any, what: BucketLocation) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError) as error:
        raise OutsideFailure(f"reading {what} failed: {tensorstore_reason(error)}") from error


def _changed(what: BucketLocation) -> BadInput:
    return BadInput(f"{what} changed while it was read; run again when nothing writes to the source")


class BucketFiles(Files):
    """The files of a Hugging Face checkpoint at `location`.

    Only small files are copied. An object's generation, which is a time in microseconds, is used as its modification
    time: an object that is written again counts as changed.

    Args:
        location: The checkpoint's prefix.
        directory: Where the small files are copied to. The caller owns it.
        objects: The bucket client's blobs, by name in the prefix.
        cache_bytes: The most memory for blocks; four blocks are kept even if it is less.
    """

    def __init__(self, location: BucketLocation, directory: Path, objects: Mapping[str, Any], cache_bytes: int) -> None:
        self.name, self.directory = str(location), directory
        self._location, self._store, self._objects = location, open_store(location), objects
        self._headers: dict[str, bytes] = {}
        self._generations: dict[str, Any] = {}
        self._blocks: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._kept = max(4, cache_bytes // BLOCK_BYTES)

    def fetch_header(self, shard: str) -> None:
        """Reads the header of a shard and remembers its generation.

        Raises:
            BadInput: The object changed during the read.
            OutsideFailure: The read failed.
        """
        self._headers[shard] = header_bytes(self._objects[shard].size, partial(self._first_bytes, shard))

    def weights(self) -> set[str]:
        return {name for name in self._objects if name.endswith(SUFFIX)}

    def header(self, shard: str) -> tuple[Shard, bytes]:
        return Shard(shard, self._objects[shard].size, self._modified(shard)), self._headers[shard]

    def reader(self, shard: str) -> ReadRun:
        return partial(self._read_run, shard)

    def _modified(self, name: str) -> int:
        return int(self._objects[name].generation) * 1000

    def _first_bytes(self, name: str, count: int) -> bytes:
        result = _result(self._store.read(name, byte_range=slice(0, count)), self._location / name)
        generation = self._generations.setdefault(name, result.stamp.generation)
        if result.state != "value" or generation != result.stamp.generation:
            raise _changed(self._location / name)
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
        """Returns one block, and requests the next ones: a quarter of the cache, since there may be two readers."""
        with self._lock:
            last = min(number + self._kept // 4, (self._objects[name].size - 1) // BLOCK_BYTES)
            for ahead in range(last, number - 1, -1):
                self._ask(name, ahead)
            future = self._blocks[name, number]
        location = self._location / name
        result = _result(future, location)
        if result.state != "value" or result.stamp.generation != self._generations[name]:
            raise _changed(location)
        return bytes(result.value)

    def _ask(self, name: str, number: int) -> None:
        key, start = (name, number), number * BLOCK_BYTES
        if key not in self._blocks:
            stop = min(start + BLOCK_BYTES, self._objects[name].size)
            self._blocks[key] = self._store.read(name, byte_range=slice(start, stop))
        self._blocks.move_to_end(key)
        while len(self._blocks) > self._kept:
            self._blocks.popitem(last=False)
