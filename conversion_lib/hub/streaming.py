"""Converting a Hub repository shard by shard, on a disk smaller than the model.

Planned from the headers alone; then each shard is fetched ahead of the pieces that need it, verified against the
Hub's hash before a value of it is used, and removed when they have been made. Pieces come in the order in which the
last of their shards does: an array that stacks a small tensor of every layer waits for the last one, and until then
only those tensors' bytes are kept of the others.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from conversion_lib import hub
from conversion_lib.core.boxes import size
from conversion_lib.core.dtypes import itemsize
from conversion_lib.core.retry import Backoff
from conversion_lib.core.tensors import Source
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.hub.files import Fetcher, RemoteFile
from conversion_lib.hub.headers import fill_headers
from conversion_lib.hub.shelf import Demand, Range, Shelf, most_bytes
from conversion_lib.plan.pieces import Piece, source_order
from conversion_lib.plan.plan import Plan
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.sources.safetensors import Handles, ReadRun, SafetensorsSource
from conversion_lib.storage.files import existing_parent

SHARDS_AT_ONCE = 3
"""On disk: one that is being converted and two that are on their way; fewer where the disk has no room for three."""
OUTPUT_MARGIN = 1.05
"""On disk, at most so many bytes for each byte of the result."""


@dataclass(frozen=True)
class Remote:
    """A repository at one commit whose headers and small files lie in `headers`, and whose weights are on the Hub."""

    resolved: hub.Resolved
    headers: Path
    shelf: Path
    output: Path | None
    """A path on the disk that the result is written to; None where that is not a disk of this machine."""
    backoff: Backoff
    reporter: Reporter

    @property
    def name(self) -> str:
        return f"{self.resolved.repo}@{self.resolved.commit}"

    def open(self) -> StreamedSource:
        return StreamedSource(self)

    def pace(self, stored: SafetensorsSource, shown: Source) -> StreamedSource:
        """`stored` itself, which learns as what the plan sees it: dequantized, joined."""
        assert isinstance(stored, StreamedSource)
        stored.shown = shown
        return stored


@contextmanager
def streamed(
    repo: str,
    revision: str,
    shelf: Path,
    *,
    output: Path | None = None,
    backoff: Backoff | None = None,
    reporter: Reporter = SILENT,
) -> Iterator[Remote]:
    """`repo` at the commit that `revision` names now, for `convert` to read shard by shard; `shelf` holds the shards.

    Raises what `headers_of` raises.
    """
    backoff, started = backoff or Backoff(), hub.now()
    resolved = hub.resolve(repo, revision, backoff=backoff, reporter=reporter)
    resolved = resolved.model_copy(update={"files": hub.needed_files(resolved)})
    with tempfile.TemporaryDirectory(prefix="ferry-headers-") as name:
        headers = Path(name)
        try:
            small = {file.path for file in resolved.files if not file.path.endswith(".safetensors")}
            fill_headers(headers, resolved, small, backoff, reporter)
            hub.write_provenance(headers, resolved, revision, started, None)
            yield Remote(resolved, headers, shelf, output, backoff, reporter)
        except BadInput as error:  # nobody can look at the copy afterwards
            raise BadInput(str(error).replace(name, f"{repo}@{resolved.commit}")) from error


class StreamedSource(SafetensorsSource):
    """A source whose shards are fetched when `order` has told which are needed; the engine's Pace as well."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(remote.headers)
        self._remote = remote
        self.shown: Source = self
        self._shards_of: dict[Piece, list[str]] = {}
        self._local = Handles()
        fetcher = Fetcher(
            remote.resolved.repo, remote.resolved.commit, hub.hub_endpoint(), remote.shelf / "hub", remote.shelf
        )
        by_name = {file.path: file for file in remote.resolved.files}
        self.shelf = Shelf(
            remote.shelf,
            lambda name, stopped: _fetch(remote, fetcher, by_name[name], stopped),
            self._local.forget,
        )

    def _runs(self, file: Path) -> ReadRun:
        def read(offset: int, view: memoryview) -> None:
            for _ in range(3):
                path = self.shelf.path(file.name, offset, offset + len(view))
                try:
                    reader = self._local.reader(path)
                except FileNotFoundError:
                    continue  # replaced by what is kept of it, just now
                return reader(offset, view)
            raise OutsideFailure(f"{path} has gone: something else removes files there")

        return read

    def order(self, plan: Plan, todo: list[Piece]) -> list[Piece]:
        """`todo` by the last shard that each piece waits for; begins to fetch.

        Raises BadInput where the disk is too small.
        """
        names = [file.name for file in self.files]
        place = {name: number for number, name in enumerate(names)}
        sizes = {file.path: file.size for file in self._remote.resolved.files}
        demands = {name: Demand(name, sizes[name]) for name in names}
        for piece, tensors in self._stored_tensors(plan, todo).items():
            shards = {self.offset_of(tensor).file.name for tensor in tensors}
            last = max(shards, key=place.__getitem__)
            self._shards_of[piece] = [last, *(shards - {last})]
            demands[last].users += 1
            for shard in shards - {last}:
                demands[shard].later += 1
                demands[shard].until = max(demands[shard].until, place[last])
            for tensor in tensors:
                if (shard := self.offset_of(tensor).file.name) != last:
                    demands[shard].ranges.add(self._range(tensor))
        output = sum(size(piece.box) * itemsize(plan.arrays[piece.array].dtype) for piece in todo)
        self._begin(list(demands.values()), output)
        by_source = source_order(plan, self.shown.tensors)
        return sorted(todo, key=lambda piece: (place[self._shards_of[piece][0]], by_source(piece)))

    def was_read(self, piece: Piece) -> None:
        last, *others = self._shards_of.pop(piece)
        self.shelf.used(last, last=True)
        for shard in others:
            self.shelf.used(shard, last=False)

    def end(self) -> None:
        self.shelf.close()

    def _begin(self, demands: list[Demand], output_bytes: int) -> None:
        remote, free = self._remote, shutil.disk_usage(existing_parent(self._remote.shelf)).free
        free += sum(path.stat().st_size for path in remote.shelf.glob("*.safetensors"))
        output = int(output_bytes * OUTPUT_MARGIN) if _same_disk(remote.shelf, remote.output) else 0
        needs = {count: most_bytes(demands, count) for count in range(SHARDS_AT_ONCE, 0, -1)}
        limit = next((count for count, nbytes in needs.items() if nbytes + output <= free), None)
        if limit is None:
            raise BadInput(
                f"{remote.shelf}: the disk has {format_bytes(free)} free; one shard of {remote.name} at a time and what"
                f" several arrays need of others take {format_bytes(needs[1])}, and the result here"
                f" {format_bytes(output)}: free some, or give another destination"
            )
        remote.reporter.say(
            f"streaming {remote.name}: at most {limit} of {len(demands)} shards at once,"
            f" {format_bytes(needs[limit])} of disk"
        )
        self.shelf.begin(demands, limit)

    def _stored_tensors(self, plan: Plan, todo: list[Piece]) -> dict[Piece, set[str]]:
        """The tensors of the files that each piece reads.

        A hint: a read that none of this foresaw fetches its shard all the same.
        """

        @cache
        def behind(name: str) -> set[str]:
            return {stored.name for stored in self.shown.requires(name)}

        return {
            piece: set().union(*[behind(source.tensor) for source in plan.arrays[piece.array].sources_in(piece.box)])
            for piece in todo
        }

    def _range(self, tensor: str) -> Range:
        offset = self.offset_of(tensor).offset
        return offset, offset + self.tensors[tensor].nbytes


def shelf_directory(name: str) -> Path:
    """Where the shards for a run lie whose destination, `name`, is not on a disk of this machine."""
    return hub.cache_directory() / "streams" / hashlib.sha256(name.encode()).hexdigest()[:16]


def _fetch(remote: Remote, fetcher: Fetcher, file: RemoteFile, stopped: threading.Event) -> None:
    def advance(nbytes: int) -> None:
        if stopped.is_set():  # the one way to end the client's own loop
            raise OutsideFailure(f"{file.path}: stopped")

    work = partial(fetcher.fetch, file, advance, afresh=True)
    remote.backoff.run(work, stopped=stopped, reporter=remote.reporter)
    _require_header(remote, file.path)


def _require_header(remote: Remote, name: str) -> None:
    """Raises OutsideFailure where a verified shard has not the header that the plan was made from."""
    with (remote.shelf / name).open("rb") as shard, (remote.headers / name).open("rb") as planned:
        length = int.from_bytes(planned.read(8), "little")
        planned.seek(0)
        if shard.read(8 + length) != planned.read(8 + length):
            raise OutsideFailure(
                f"{name} of {remote.name} has another header than the Hub gave when it was planned; run again"
            )


def _same_disk(shelf: Path, output: Path | None) -> bool:
    if output is None:
        return False
    return existing_parent(shelf).stat().st_dev == existing_parent(output.absolute()).stat().st_dev
