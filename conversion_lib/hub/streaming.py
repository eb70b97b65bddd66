"""Converts a Hub repository shard by shard, on a disk smaller than the model.

The plan is made from the headers alone. Each shard is fetched before the pieces that need it, verified against the
Hub's hash before any value of it is used, and removed when those pieces are made. Pieces are made in the order of the
last shard that each one needs. An array that stacks a small tensor of every layer waits for the last shard; until then,
only the bytes of those tensors are kept from the other shards.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from conversion_lib import hub
from conversion_lib.core.boxes import size
from conversion_lib.core.dtypes import itemsize
from conversion_lib.core.retry import Backoff
from conversion_lib.core.tensors import Source
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.hub.files import Fetcher
from conversion_lib.hub.headers import HubFiles, read_range
from conversion_lib.hub.shard_cache import Demand, Range, ShardCache, most_bytes
from conversion_lib.plan.pieces import Piece, source_order
from conversion_lib.plan.plan import Plan
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.sources.files import Handles, ReadRun
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.storage.disk import free_bytes, same_disk

SHARDS_AT_ONCE = 3
"""Whole shards on disk: one in conversion and two being fetched; fewer if the disk is too small for three."""
OUTPUT_MARGIN = 1.05
"""Maximum bytes on disk per byte of the result."""


@contextmanager
def streamed(
    repo: str,
    revision: str,
    cache: Path,
    *,
    output: Path | None = None,
    backoff: Backoff | None = None,
    reporter: Reporter = SILENT,
) -> Iterator[StreamedFiles]:
    """Opens `repo`, at the commit that `revision` names now, so that `convert` reads it shard by shard.

    Args:
        repo: The repository, such as `Qwen/Qwen3-0.6B`.
        revision: A branch, a tag or a commit.
        cache: The directory for shards.
        output: A path on the disk that the result is written to; None if it is not written to a local disk.
        backoff: The retries of each request; None: the default ones.
        reporter: Shows progress and messages.

    Yields:
        The files. Copies of the small ones are deleted at the end of the context.

    Raises:
        BadInput: As for `headers_of`.
        OutsideFailure: As for `headers_of`.
    """
    backoff = backoff or Backoff()
    resolved = hub.resolve(repo, revision, backoff=backoff, reporter=reporter)
    with tempfile.TemporaryDirectory(prefix="ferry-config-") as name:
        needed = hub.needed_files(resolved, Path(name), leave_index=True, backoff=backoff, reporter=reporter)
        resolved = resolved.model_copy(update={"files": needed})
        files = StreamedFiles(resolved, Path(name), cache, output, backoff, reporter)
        files.fetch({path for path in files.remote if not path.endswith(".safetensors")}, backoff, reporter)
        yield files


class StreamedFiles(HubFiles):
    """A repository at one commit. A Stream starts to fetch its shards, which are read from a cache on disk.

    Reads before that, which the plan depends on, fetch only the bytes that they need.
    """

    readable = True

    def __init__(
        self,
        resolved: hub.Resolved,
        directory: Path,
        cache: Path,
        output: Path | None,
        backoff: Backoff,
        reporter: Reporter,
    ) -> None:
        super().__init__(resolved, directory)
        self.output, self.reporter = output, reporter
        self.cache_directory = cache  # made, and looked at for links, when the first shard is to come
        self._backoff, self._local = backoff, Handles()
        self._fetcher = Fetcher(resolved.repo, resolved.commit, hub.hub_endpoint(), cache / "hub", cache)
        self.cache = ShardCache(cache, self._fetch, self._local.forget)

    def reader(self, shard: str) -> ReadRun:
        def read(offset: int, view: memoryview) -> None:
            if not self.cache.begun:
                return self._read_range(shard, offset, view)
            for _ in range(3):
                path = self.cache.path(shard, offset, offset + len(view))
                try:
                    reader = self._local.reader(path)
                except FileNotFoundError:
                    continue  # just replaced by its kept ranges
                return reader(offset, view)
            raise OutsideFailure(f"{path} was removed: another process removes files there")

        return read

    def _read_range(self, shard: str, offset: int, view: memoryview) -> None:
        part = f"bytes {offset} to {offset + len(view)}"
        work = partial(read_range, self._fetcher, self.remote[shard], offset, len(view), part)
        view[:] = self._backoff.run(work, reporter=self.reporter)

    def pace(self, stored: Source, shown: Source) -> Stream:
        assert isinstance(stored, SafetensorsSource)  # the source that these files are opened as
        return Stream(self, stored, shown)

    def _fetch(self, name: str, stopped: threading.Event) -> None:
        """Fetches a shard into the cache. Raises OutsideFailure if its header is not the one that the plan used."""
        file = self.remote[name]

        def advance(nbytes: int) -> None:
            if stopped.is_set():  # the only way to end the client's own loop
                raise OutsideFailure(f"{name}: stopped")

        work = partial(self._fetcher.fetch, file, advance, afresh=True)
        self._backoff.run(work, stopped=stopped, reporter=self.reporter)
        planned = self.headers[name]
        with (self.cache_directory / name).open("rb") as shard:
            if shard.read(len(planned)) != planned:
                raise OutsideFailure(
                    f"{name} of {self.name} has another header than the Hub gave for the plan; run again"
                )


class Stream:
    """The engine's Pace for a repository that is read shard by shard.

    Args:
        files: The repository's files.
        stored: The source of the files themselves.
        shown: The source that the plan reads, such as `stored` dequantized.
    """

    def __init__(self, files: StreamedFiles, stored: SafetensorsSource, shown: Source) -> None:
        self._files, self._stored, self._shown = files, stored, shown
        self._shards_of: dict[Piece, list[str]] = {}

    def order(self, plan: Plan, todo: list[Piece]) -> list[Piece]:
        """Sorts `todo` by the last shard that each piece needs, and starts to fetch shards.

        Raises:
            BadInput: The disk is too small.
        """
        position = {shard.name: number for number, shard in enumerate(self._stored.shards)}
        demands = {shard.name: Demand(shard.name, shard.size) for shard in self._stored.shards}
        for piece, tensors in self._stored_tensors(plan, todo).items():
            shards = {self._stored.offset_of(tensor).file for tensor in tensors}
            last = max(shards, key=position.__getitem__)
            self._shards_of[piece] = [last, *(shards - {last})]
            demands[last].users += 1
            for shard in shards - {last}:
                demands[shard].later += 1
                demands[shard].until = max(demands[shard].until, position[last])
            for tensor in tensors:
                if (shard := self._stored.offset_of(tensor).file) != last:
                    demands[shard].ranges.add(self._range(tensor))
        output = sum(size(piece.box) * itemsize(plan.arrays[piece.array].dtype) for piece in todo)
        self._begin(list(demands.values()), output)
        by_source = source_order(plan, self._shown.tensors)
        return sorted(todo, key=lambda piece: (position[self._shards_of[piece][0]], by_source(piece)))

    def was_read(self, piece: Piece) -> None:
        last, *others = self._shards_of.pop(piece)
        self._files.cache.used(last, last=True)
        for shard in others:
            self._files.cache.used(shard, last=False)

    def end(self) -> None:
        self._files.cache.close()

    def _begin(self, demands: list[Demand], output_bytes: int) -> None:
        files, cache = self._files, self._files.cache_directory
        free = free_bytes(cache) + sum(path.stat().st_size for path in cache.glob("*.safetensors"))
        beside = files.output is not None and same_disk(cache, files.output)
        output = int(output_bytes * OUTPUT_MARGIN) if beside else 0
        needs = {count: most_bytes(demands, count) for count in range(SHARDS_AT_ONCE, 0, -1)}
        limit = next((count for count, nbytes in needs.items() if nbytes + output <= free), None)
        if limit is None:
            raise BadInput(
                f"{cache}: the disk has {format_bytes(free)} free; one shard of {files.name} at a time and the kept"
                f" parts of others need {format_bytes(needs[1])}, and the result on this disk needs"
                f" {format_bytes(output)}: free some space, or give another destination"
            )
        files.reporter.say(
            f"streaming {files.name}: at most {limit} of {len(demands)} shards at once,"
            f" {format_bytes(needs[limit])} on disk"
        )
        files.cache.begin(demands, limit)

    def _stored_tensors(self, plan: Plan, todo: list[Piece]) -> dict[Piece, set[str]]:
        """Returns the stored tensors that each piece reads.

        This is a hint: an unexpected read also fetches its shard.
        """

        @cache
        def behind(name: str) -> set[str]:
            return {stored.name for stored in self._shown.requires(name)}

        return {
            piece: set().union(*[behind(source.tensor) for source in plan.arrays[piece.array].sources_in(piece.box)])
            for piece in todo
        }

    def _range(self, tensor: str) -> Range:
        offset = self._stored.offset_of(tensor).offset
        return offset, offset + self._stored.tensors[tensor].nbytes


def cache_directory(name: str) -> Path:
    """Returns the directory of shards for a run whose destination, `name`, is not on a local disk."""
    return hub.cache_directory() / "streams" / hashlib.sha256(name.encode()).hexdigest()[:16]
