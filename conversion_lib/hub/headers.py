"""A checkpoint on the Hub from its headers alone: the little that a plan needs of it, without the weights."""

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
from conversion_lib.hub.errors import explain, shown_endpoint
from conversion_lib.hub.files import Fetcher, RemoteFile
from conversion_lib.models.hf_config import CONFIG_NAME
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import HF_RECORD_NAME, PROVENANCE_NAME
from conversion_lib.sources.files import Files, ReadRun, Shard, header_bytes
from conversion_lib.sources.safetensors import INDEX_NAME, shard_names
from conversion_lib.storage.files import disk_error, in_parallel

FETCHED_WHOLE = (CONFIG_NAME, INDEX_NAME, HF_RECORD_NAME)
"""What planning reads besides the weights' headers."""
THREADS = 8


@contextmanager
def headers_of(
    repo: str, revision: str = "main", *, reporter: Reporter = SILENT, backoff: Backoff | None = None
) -> Iterator[HubFiles]:
    """What a plan can be made from, of `repo` at the commit that `revision` names now.

    The config and the index are fetched, and of each weight file the header; none of them can be read. A plan made
    from it has the fingerprint that it would have after a download of that commit, since both go by the headers and
    the hashes that the Hub gives (for weights outside LFS and Xet a git id, which a download does not go by).
    The small files are temporary: they are gone when the context ends.

    Raises BadInput for what `resolve` and SafetensorsSource call so, OutsideFailure where the Hub fails for longer
    than `backoff` tries.
    """
    backoff = backoff or Backoff()
    resolved = hub.resolve(repo, revision, backoff=backoff, reporter=reporter)
    resolved = resolved.model_copy(update={"files": hub.needed_files(resolved)})
    reporter.say(f"{repo} at {resolved.commit}: fetching headers only, not the weights")
    with tempfile.TemporaryDirectory(prefix="ferry-config-") as name:
        files = HubFiles(resolved, Path(name))
        files.fetch(FETCHED_WHOLE, backoff, reporter)
        # the part of a download's provenance by which a source is identified
        (Path(name) / PROVENANCE_NAME).write_text(resolved.model_dump_json())
        yield files


class HubFiles(Files):
    """A repository at one commit, of which the small files are copied into `directory`, and no weights."""

    def __init__(self, resolved: hub.Resolved, directory: Path) -> None:
        self.resolved, self.directory = resolved, directory
        self.name = f"{resolved.repo}@{resolved.commit}"
        self.remote = {file.path: file for file in resolved.files}
        self.headers: dict[str, bytes] = {}
        """Of each weight file that the checkpoint has, its length and header."""

    def fetch(self, fetched_whole: Collection[str], backoff: Backoff, reporter: Reporter) -> None:
        """Fetches the files that `fetched_whole` names, then the header of each weight file."""
        repo, commit, endpoint = self.resolved.repo, self.resolved.commit, hub.hub_endpoint()
        fetcher = Fetcher(repo, commit, endpoint, self.directory / hub.WORK_NAME, self.directory)

        def fetch_small(file: RemoteFile, stopped: threading.Event) -> None:
            # afresh: what the client's own cache has may be damaged, and these are small
            work = partial(fetcher.fetch, file, lambda nbytes: None, afresh=True)
            backoff.run(work, stopped=stopped, reporter=reporter)

        def fetch_header(name: str, stopped: threading.Event) -> None:
            file = self.remote[name]
            work = partial(header_bytes, file.size, partial(_first_bytes, fetcher, file))
            self.headers[name] = backoff.run(work, stopped=stopped, reporter=reporter)

        try:
            small = [file for file in self.resolved.files if file.path in fetched_whole]
            in_parallel(fetch_small, small, threads=THREADS)
            in_parallel(fetch_header, shard_names(self), threads=THREADS)
        except OSError as error:
            raise disk_error(error, "cannot write the config") from error

    def has(self, shard: str) -> bool:
        return shard in self.remote

    def header(self, shard: str) -> tuple[Shard, bytes]:
        file = self.remote[shard]
        # a commit does not change
        return Shard(shard, file.size, 0, file.sha256 or f"git id {file.blob_id}"), self.headers[shard]

    def reader(self, shard: str) -> ReadRun:
        raise AssertionError(f"{shard} of {self.name} is on the Hub: a plan is made from headers alone")

    def modified(self, name: str) -> int:
        return 0


def _first_bytes(fetcher: Fetcher, file: RemoteFile, count: int) -> bytes:
    """The first `count` bytes of `file`. Raises Passing for what another try may mend.

    The client's own `parse_safetensors_file_metadata` asks in the same way, but gives the header parsed, of which
    the bytes that the fingerprint is made of cannot be had back. Its session drops the token where the Hub sends it
    on to another host, as it does for weights.
    """
    what, content = f"the header of {file.path} of {fetcher.repo} at {fetcher.commit}", bytearray()
    try:
        url = hf_hub_url(fetcher.repo, file.path, revision=fetcher.commit, endpoint=fetcher.endpoint)
        headers = build_hf_headers(headers={"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"})
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
            hf_raise_for_status(answer)
            for block in answer.iter_bytes():
                content += block
                if len(content) > count:  # a server may pass over the range and send the whole file
                    break
    except Exception as error:
        raise explain(error, what, fetcher.repo, fetcher.endpoint) from error
    if len(content) < count:
        raise Passing(f"{what} from {shown_endpoint(fetcher.endpoint)}: {len(content)} bytes came, expected {count}")
    return bytes(content[:count])
