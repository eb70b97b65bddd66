"""A checkpoint on the Hub from its headers alone: the little that a plan needs of it, without the weights.

The tensors of a safetensors file come after its header. So a sparse file of the true size, with the true header and
nothing behind it, is the real one to everything that reads headers only.
"""

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
from conversion_lib.errors import BadInput
from conversion_lib.hub.errors import explain, shown_endpoint
from conversion_lib.hub.files import Fetcher, RemoteFile
from conversion_lib.models.hf_config import CONFIG_NAME
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import HF_RECORD_NAME, PROVENANCE_NAME
from conversion_lib.sources.remote import write_header
from conversion_lib.sources.safetensors import INDEX_NAME, shard_files
from conversion_lib.storage.files import disk_error, in_parallel

FETCHED_WHOLE = (CONFIG_NAME, INDEX_NAME, HF_RECORD_NAME)
"""What planning reads besides the weights' headers."""
THREADS = 8


@contextmanager
def headers_of(
    repo: str, revision: str = "main", *, reporter: Reporter = SILENT, backoff: Backoff | None = None
) -> Iterator[Path]:
    """A directory to plan from, which stands for `repo` at the commit that `revision` names now.

    It has the config, the index, and for each weight file one of the true size with the true header; the tensors
    read as zeros. A plan made from it has the fingerprint that it would have after a download of that commit, since
    both go by the headers and the hashes that the Hub gives (it gives none for weights outside LFS and Xet).
    The directory is temporary: it is gone when the context ends.

    Raises BadInput for what `resolve` and SafetensorsSource call so, OutsideFailure where the Hub fails for longer
    than `backoff` tries. A BadInput that the caller raises about the directory is made to name the repository.
    """
    backoff = backoff or Backoff()
    resolved = hub.resolve(repo, revision, backoff=backoff, reporter=reporter)
    resolved = resolved.model_copy(update={"files": hub.needed_files(resolved)})
    reporter.say(f"{repo} at {resolved.commit}: fetching headers only, not the weights")
    with tempfile.TemporaryDirectory(prefix="ferry-headers-") as name:
        try:
            fill_headers(Path(name), resolved, FETCHED_WHOLE, backoff, reporter)
            # the part of a download's provenance by which a source is identified; what is newer counts as changed
            (Path(name) / PROVENANCE_NAME).write_text(resolved.model_dump_json())
            yield Path(name)
        except BadInput as error:  # nobody can look at the copy afterwards
            raise BadInput(str(error).replace(name, f"{repo}@{resolved.commit}")) from error


def fill_headers(
    directory: Path, resolved: hub.Resolved, fetched_whole: Collection[str], backoff: Backoff, reporter: Reporter
) -> None:
    """Fetches into `directory` the files of `resolved` that `fetched_whole` names, and the weights' headers."""
    fetcher = Fetcher(resolved.repo, resolved.commit, hub.hub_endpoint(), directory / hub.WORK_NAME, directory)

    def fetch(file: RemoteFile, stopped: threading.Event) -> None:
        if file.path in fetched_whole:
            # afresh: what the client's own cache has may be damaged, and these are small
            work = partial(fetcher.fetch, file, lambda nbytes: None, afresh=True)
        else:
            work = partial(write_header, directory / file.path, file.size, partial(_first_bytes, fetcher, file))
        backoff.run(work, stopped=stopped, reporter=reporter)

    try:
        for file in resolved.files:
            if file.path.endswith(".safetensors"):
                with (directory / file.path).open("wb") as stream:
                    stream.truncate(file.size)
        in_parallel(fetch, [file for file in resolved.files if file.path in fetched_whole], threads=THREADS)
        wanted = {path.name for path in shard_files(directory)}
        in_parallel(fetch, [file for file in resolved.files if file.path in wanted], threads=THREADS)
    except OSError as error:
        raise disk_error(error, "cannot write the headers") from error


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
