"""Checkpoints in a bucket as sources; of Hugging Face's the headers here, weights by ranged reads of one generation.

Blocks of a shard are asked for ahead of the pieces that need them, many at a time, and a few are kept in memory.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import tensorstore as ts

from conversion_lib.core.tensors import Source
from conversion_lib.errors import BadInput, OutsideFailure, tensorstore_reason
from conversion_lib.plan.pace import Pace
from conversion_lib.sources.mirror import items_in, mirrored
from conversion_lib.sources.remote import write_header
from conversion_lib.sources.safetensors import ReadRun, SafetensorsSource
from conversion_lib.storage import gcs as cloud_place
from conversion_lib.storage.files import in_parallel
from conversion_lib.storage.gcs import BucketLocation

BLOCK_BYTES = 4 << 20
CACHE_SHARE = 16
"""Of the memory budget, what blocks may take: those that are kept, and those that are on their way."""
BESIDE = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*", "README.md")
"""Files that are fetched whole."""


@dataclass(frozen=True)
class CloudRemote:
    """A checkpoint at `place` whose headers and small files lie in `headers`."""

    place: BucketLocation
    headers: Path
    generations: dict[str, Any]
    """Of each shard, as TensorStore tells it."""
    cache_bytes: int

    @property
    def name(self) -> str:
        return str(self.place)

    def open(self) -> CloudSource:
        return CloudSource(self)

    def pace(self, stored: SafetensorsSource, shown: Source) -> Pace | None:
        return None


@contextmanager
def checkpoint_in_bucket(url: str, memory_budget: int) -> Iterator[tuple[Path, CloudRemote | None]]:
    """The checkpoint of either kind at gs://bucket/prefix: a directory that stands for it, which of MaxText's is all.

    Of Hugging Face's it has the headers, and the weights are where the second value says. Raises BadInput where there
    is no checkpoint.
    """
    if items_in(BucketLocation.parse(url)) is not None:
        with mirrored(url) as mirror:
            yield mirror, None
    else:
        with in_bucket(url, memory_budget) as remote:
            yield remote.headers, remote


@contextmanager
def in_bucket(url: str, memory_budget: int) -> Iterator[CloudRemote]:
    """The checkpoint at gs://bucket/prefix, for `convert` to read where it lies.

    A file's time of modification here is the time at which its object was written: an object that is written anew
    counts as changed. Raises BadInput where there is no checkpoint.
    """
    place = BucketLocation.parse(url)
    objects = {name: blob for blob in place.blobs() if "/" not in (name := blob.name[len(place.name) + 1 :])}
    shards = [name for name in objects if name.endswith(".safetensors")]
    if not shards:
        raise BadInput(f"{url} holds no safetensors: give the prefix of a Hugging Face checkpoint, or a directory")
    beside = [name for name in objects if any(fnmatch(name, pattern) for pattern in BESIDE)]
    with tempfile.TemporaryDirectory(prefix="ferry-headers-") as directory:
        headers = Path(directory)
        store, generations = open_store(place), dict[str, Any]()

        def fetch(name: str, stopped: threading.Event) -> None:
            if name in beside:
                (headers / name).write_bytes((place / name).read() or b"")
            else:
                write_header(headers / name, objects[name].size, partial(_first_bytes, store, place, name, generations))

        in_parallel(fetch, [*shards, *beside], threads=cloud_place.REQUESTS)
        again = {blob.name[len(place.name) + 1 :]: blob.generation for blob in place.blobs()}
        for name in [*shards, *beside]:
            if again.get(name) != objects[name].generation:
                raise _changed(place / name)
            written = objects[name].generation * 1000  # a generation is a time in microseconds
            os.utime(headers / name, ns=(written, written))
        try:
            yield CloudRemote(place, headers, generations, memory_budget // CACHE_SHARE)
        except BadInput as error:  # nobody can look at the copy afterwards
            raise BadInput(str(error).replace(directory, url)) from error


def open_store(place: BucketLocation) -> Any:
    """TensorStore's store of the objects below."""
    return ts.KvStore.open(place.spec, context=ts.Context(cloud_place.TENSORSTORE_REQUESTS)).result()


def _first_bytes(store: Any, place: BucketLocation, name: str, generations: dict[str, Any], count: int) -> bytes:
    result = _result(store.read(name, byte_range=slice(0, count)), place / name)
    if result.state != "value" or generations.setdefault(name, result.stamp.generation) != result.stamp.generation:
        raise _changed(place / name)
    return bytes(result.value)


def _result(future: Any, what: BucketLocation) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError) as error:
        raise OutsideFailure(f"reading {what} failed: {tensorstore_reason(error)}") from error


def _changed(what: BucketLocation) -> BadInput:
    return BadInput(f"{what} changed while it was read; run again when the source is at rest")


class CloudSource(SafetensorsSource):
    """A source whose shards are read in blocks from the bucket."""

    def __init__(self, remote: CloudRemote) -> None:
        super().__init__(remote.headers)
        self._remote, self._store = remote, open_store(remote.place)
        self._blocks: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._kept = max(4, remote.cache_bytes // BLOCK_BYTES)
        self._sizes = {file.name: file.stat().st_size for file in self.files}

    def _runs(self, file: Path) -> ReadRun:
        return partial(self._read_run, file.name)

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
            last = min(number + self._kept // 4, (self._sizes[name] - 1) // BLOCK_BYTES)
            for ahead in range(last, number - 1, -1):
                self._ask(name, ahead)
            future = self._blocks[name, number]
        place = self._remote.place / name
        result = _result(future, place)
        if result.state != "value" or result.stamp.generation != self._remote.generations[name]:
            raise _changed(place)
        return bytes(result.value)

    def _ask(self, name: str, number: int) -> None:
        key, start = (name, number), number * BLOCK_BYTES
        if key not in self._blocks:
            stop = min(start + BLOCK_BYTES, self._sizes[name])
            self._blocks[key] = self._store.read(name, byte_range=slice(start, stop))
        self._blocks.move_to_end(key)
        while len(self._blocks) > self._kept:
            self._blocks.popitem(last=False)
