"""Converting a Hub repository shard by shard, on a disk smaller than the model.

Planned from the headers alone; then each shard is fetched ahead of the pieces that need it, verified against the
Hub's hash before a value of it is used, and removed when they have been made. Pieces come in the order in which the
last of their shards does: an array that stacks a small tensor of every layer waits for the last one, and until then
only those tensors' bytes are kept of the others.
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
from conversion_lib.hub.headers import HubFiles
from conversion_lib.hub.shard_cache import Demand, Range, ShardCache, most_bytes
from conversion_lib.plan.pieces import Piece, source_order
from conversion_lib.plan.plan import Plan
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.sources.files import Handles, ReadRun
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.storage.disk import free_bytes, same_disk

SHARDS_AT_ONCE = 3
"""On disk: one that is being converted and two that are on their way; fewer where the disk has no room for three."""
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
    """`repo` at the commit that `revision` names now, for `convert` to read shard by shard; `cache` holds the shards.

    output: a path on the disk that the result is written to; None where that is not a disk of this machine.
    Raises what `headers_of` raises.
    """
    backoff, started = backoff or Backoff(), hub.now()
    resolved = hub.resolve(repo, revision, backoff=backoff, reporter=reporter)
    resolved = resolved.model_copy(update={"files": hub.needed_files(resolved)})
    with tempfile.TemporaryDirectory(prefix="ferry-config-") as name:
        files = StreamedFiles(resolved, Path(name), cache, output, backoff, reporter)
        files.fetch({path for path in files.remote if not path.endswith(".safetensors")}, backoff, reporter)
        hub.write_provenance(files.directory, resolved, revision, started, None)
        yield files


class StreamedFiles(HubFiles):
    """A repository at one commit whose shards are fetched when a Stream has begun to, and read from `cache`."""

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
        self.cache_directory = cache
        self._backoff, self._local = backoff, Handles()
        self._fetcher = Fetcher(resolved.repo, resolved.commit, hub.hub_endpoint(), cache / "hub", cache)
        self.cache = ShardCache(cache, self._fetch, self._local.forget)

    def reader(self, shard: str) -> ReadRun:
        def read(offset: int, view: memoryview) -> None:
            for _ in range(3):
                path = self.cache.path(shard, offset, offset + len(view))
                try:
                    reader = self._local.reader(path)
                except FileNotFoundError:
                    continue  # replaced by what is kept of it, just now
                return reader(offset, view)
            raise OutsideFailure(f"{path} has gone: something else removes files there")

        return read

    def pace(self, stored: Source, shown: Source) -> Stream:
        assert isinstance(stored, SafetensorsSource)  # what these files make
        return Stream(self, stored, shown)

    def _fetch(self, name: str, stopped: threading.Event) -> None:
        """Brings a shard to the cache. Raises OutsideFailure where it has not the header that was planned from."""
        file = self.remote[name]

        def advance(nbytes: int) -> None:
            if stopped.is_set():  # the one way to end the client's own loop
                raise OutsideFailure(f"{name}: stopped")

        work = partial(self._fetcher.fetch, file, advance, afresh=True)
        self._backoff.run(work, stopped=stopped, reporter=self.reporter)
        planned = self.headers[name]
        with (self.cache_directory / name).open("rb") as shard:
            if shard.read(len(planned)) != planned:
                raise OutsideFailure(
                    f"{name} of {self.name} has another header than the Hub gave when it was planned; run again"
                )


class Stream:
    """The engine's Pace for a repository that is read shard by shard. `shown`: what the plan sees of `stored`."""

    def __init__(self, files: StreamedFiles, stored: SafetensorsSource, shown: Source) -> None:
        self._files, self._stored, self._shown = files, stored, shown
        self._shards_of: dict[Piece, list[str]] = {}

    def order(self, plan: Plan, todo: list[Piece]) -> list[Piece]:
        """`todo` by the last shard that each piece waits for; begins to fetch.

        Raises BadInput where the disk is too small.
        """
        place = {shard.name: number for number, shard in enumerate(self._stored.shards)}
        demands = {shard.name: Demand(shard.name, shard.size) for shard in self._stored.shards}
        for piece, tensors in self._stored_tensors(plan, todo).items():
            shards = {self._stored.offset_of(tensor).file for tensor in tensors}
            last = max(shards, key=place.__getitem__)
            self._shards_of[piece] = [last, *(shards - {last})]
            demands[last].users += 1
            for shard in shards - {last}:
                demands[shard].later += 1
                demands[shard].until = max(demands[shard].until, place[last])
            for tensor in tensors:
                if (shard := self._stored.offset_of(tensor).file) != last:
                    demands[shard].ranges.add(self._range(tensor))
        output = sum(size(piece.box) * itemsize(plan.arrays[piece.array].dtype) for piece in todo)
        self._begin(list(demands.values()), output)
        by_source = source_order(plan, self._shown.tensors)
        return sorted(todo, key=lambda piece: (place[self._shards_of[piece][0]], by_source(piece)))

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
                f"{cache}: the disk has {format_bytes(free)} free; one shard of {files.name} at a time and what"
                f" several arrays need of others take {format_bytes(needs[1])}, and the result here"
                f" {format_bytes(output)}: free some, or give another destination"
            )
        files.reporter.say(
            f"streaming {files.name}: at most {limit} of {len(demands)} shards at once,"
            f" {format_bytes(needs[limit])} of disk"
        )
        files.cache.begin(demands, limit)

    def _stored_tensors(self, plan: Plan, todo: list[Piece]) -> dict[Piece, set[str]]:
        """The tensors of the files that each piece reads.

        A hint: a read that none of this foresaw fetches its shard all the same.
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
    """Where the shards for a run lie whose destination, `name`, is not on a disk of this machine."""
    return hub.cache_directory() / "streams" / hashlib.sha256(name.encode()).hexdigest()[:16]
