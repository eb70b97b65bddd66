"""Opens a checkpoint on the Hub for planning: fetches the config and the headers, not the weights."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported lazily

from conversion_lib import hub
from conversion_lib.core.retry import Backoff, Passing
from conversion_lib.errors import OutsideFailure
from conversion_lib.hub.errors import explain, shown_endpoint
from conversion_lib.hub.files import Fetcher, mismatch
from conversion_lib.models.hf_config import CONFIG_NAME
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import Origin, RemoteFile
from conversion_lib.sources.files import Files, ReadRun, Shard
from conversion_lib.sources.safetensors import chosen_files
from conversion_lib.sources.safetensors_header import header_bytes
from conversion_lib.sources.weight_files import INDEX_NAME, SUFFIX
from conversion_lib.storage.files import disk_error, in_parallel
from conversion_lib.storage.names import require_distinct

FETCHED_WHOLE = (CONFIG_NAME, INDEX_NAME)
"""Files that planning reads in addition to the headers of the weights."""
THREADS = 8
PARTIAL_CONTENT = 206


@contextmanager
def headers_of(
    repo: str, revision: str = "main", *, reporter: Reporter = SILENT, backoff: Backoff | None = None
) -> Iterator[HubFiles]:
    """Opens `repo`, at the commit that `revision` names now, for planning.

    Fetches the config, the index and the header of each weight file. The weights cannot be read. A plan has the same
    fingerprint as after a download of the commit, because both use the headers and the Hub's hashes. The exception is
    weights outside LFS and Xet: the Hub gives a git id for them, which a download does not use.

    Args:
        repo: The repository, such as `Qwen/Qwen3-0.6B`.
        revision: A branch, a tag or a commit.
        reporter: Shows progress and messages.
        backoff: The retries of each request; None: the default ones.

    Yields:
        The files. They are temporary, and deleted at the end of the context.

    Raises:
        BadInput: As for `resolve` and SafetensorsSource.
        OutsideFailure: The Hub fails in all tries of `backoff`.
    """
    backoff = backoff or Backoff()
    resolved = hub.resolve(repo, revision, backoff=backoff, reporter=reporter)
    with tempfile.TemporaryDirectory(prefix="ferry-config-") as name:
        needed = hub.needed_files(resolved, Path(name), leave_index=True, backoff=backoff, reporter=reporter)
        resolved = resolved.model_copy(update={"files": needed})
        reporter.say(f"{repo} at {resolved.commit}: fetching headers only, not the weights")
        files = HubFiles(resolved, Path(name))
        files.fetch(FETCHED_WHOLE, backoff, reporter)
        yield files


class HubFiles(Files):
    """A repository at one commit. Only its small files are copied.

    Args:
        resolved: The commit with the files that are needed.
        directory: Where the small files are copied to. The caller owns it.

    Attributes:
        remote: The files by path.
        headers: The length field and header of each weight file, by name; filled by `fetch`.
    """

    readable = False

    def __init__(self, resolved: hub.Resolved, directory: Path) -> None:
        self.resolved, self.directory = resolved, directory
        self.name = f"{resolved.repo}@{resolved.commit}"
        self.remote = {file.path: file for file in resolved.files}
        require_distinct(self.remote, self.name)
        self.headers: dict[str, bytes] = {}

    def fetch(self, fetched_whole: Collection[str], backoff: Backoff, reporter: Reporter) -> None:
        """Fetches some files whole, then the header of each weight file.

        Args:
            fetched_whole: The paths of the files to fetch whole. Those that the repository lacks are skipped.
            backoff: The retries of each request.
            reporter: Shows messages about retries.

        Raises:
            BadInput: As for `shard_names`, or the Hub refuses a request.
            OutsideFailure: The Hub fails in all tries, or a file cannot be written.
        """
        repo, commit, endpoint = self.resolved.repo, self.resolved.commit, hub.hub_endpoint()
        fetcher = Fetcher(repo, commit, endpoint, self.directory / hub.WORK_NAME, self.directory)

        def fetch_small(file: RemoteFile, stopped: threading.Event) -> None:
            # afresh: the client's cache may be damaged, and these files are small
            work = partial(fetcher.fetch, file, lambda nbytes: None, afresh=True)
            backoff.run(work, stopped=stopped, reporter=reporter)

        def fetch_header(name: str, stopped: threading.Event) -> None:
            file = self.remote[name]
            work = partial(header_bytes, file.size, partial(_first_bytes, fetcher, file))
            self.headers[name] = backoff.run(work, stopped=stopped, reporter=reporter)

        try:
            wanted = [file for file in self.resolved.files if file.path in fetched_whole]
            small = [file for file in wanted if mismatch(self.directory / file.path, file) is not None]
            in_parallel(fetch_small, small, threads=THREADS)
            in_parallel(fetch_header, chosen_files(self).names, threads=THREADS)
        except OSError as error:
            raise disk_error(error, "cannot write the config") from error

    def weights(self) -> set[str]:
        return {name for name in self.remote if name.endswith(SUFFIX)}

    def header(self, shard: str) -> tuple[Shard, bytes]:
        file = self.remote[shard]
        # a commit does not change
        return Shard(shard, file.size, 0, file.sha256 or f"git id {file.blob_id}"), self.headers[shard]

    def reader(self, shard: str) -> ReadRun:
        raise AssertionError(f"{shard} of {self.name} is on the Hub: a plan is made from headers alone")

    def origin(self, shards: Collection[Shard]) -> Origin:
        return Origin(path=self.name, repo=self.resolved.repo, commit=self.resolved.commit)


def _first_bytes(fetcher: Fetcher, file: RemoteFile, count: int) -> bytes:
    """Fetches the first `count` bytes of `file`. Raises Passing if a retry may help.

    The client's `parse_safetensors_file_metadata` sends the same request, but returns the parsed header, not the bytes
    that the fingerprint needs.
    """
    return read_range(fetcher, file, 0, count, "the header")


def read_range(fetcher: Fetcher, file: RemoteFile, start: int, count: int, part: str) -> bytes:
    """Reads a part of a file on the Hub. Only the length is checked, not the content.

    The client's session drops the token if the Hub redirects to another host, as for weights.

    Args:
        fetcher: Has the repository and the commit.
        file: The file.
        start: The first byte.
        count: The number of bytes.
        part: The part's name in messages.

    Raises:
        Passing: A retry may help.
        OutsideFailure: The server does not send parts of files.
    """
    what, content = f"{part} of {file.path} of {fetcher.repo} at {fetcher.commit}", bytearray()
    try:
        url = hf_hub_url(fetcher.repo, file.path, revision=fetcher.commit, endpoint=fetcher.endpoint)
        asked = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(headers=asked)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
            hf_raise_for_status(answer)
            if start and answer.status_code != PARTIAL_CONTENT:
                raise OutsideFailure(f"{what}: {shown_endpoint(fetcher.endpoint)} gives no parts of files")
            for block in answer.iter_bytes():
                content += block
                if len(content) > count:  # a server may ignore the range and send the whole file
                    break
    except Exception as error:
        raise explain(error, what, fetcher.repo, fetcher.endpoint) from error
    if len(content) < count:
        raise Passing(f"{what} from {shown_endpoint(fetcher.endpoint)}: got {len(content)} bytes, expected {count}")
    return bytes(content[:count])
