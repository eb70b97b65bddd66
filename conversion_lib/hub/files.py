"""Fetches one file of a Hub repository with the client, checks it against the Hub's metadata, and renames it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from pydantic import BaseModel, ConfigDict

from conversion_lib.core.retry import Passing
from conversion_lib.errors import BadInput
from conversion_lib.hub.errors import explain, shown_endpoint
from conversion_lib.record import Commit, RemoteFile
from conversion_lib.storage.files import sync_directory, sync_file
from conversion_lib.storage.names import path_below


class Resolved(BaseModel):
    """A repository at one commit, with every file it has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str
    commit: Commit
    files: list[RemoteFile]


def hub_endpoint() -> str:
    """Returns the Hub's URL: HF_ENDPOINT as it is now. The client reads it only when it is imported.

    Raises:
        BadInput: It is not an HTTP URL.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if not endpoint.startswith(("http://", "https://")):
        raise BadInput(f"HF_ENDPOINT is {shown_endpoint(endpoint)!r}: expected http://... or https://...")
    return endpoint


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches files of a repository at one commit into `staging`, and moves them to `destination` on the same disk."""

    repo: str
    commit: str
    endpoint: str
    staging: Path
    destination: Path

    def fetch(self, file: RemoteFile, advance: Callable[[int], None], *, afresh: bool = False) -> None:
        """Fetches `file`, checks it, syncs it, and renames it.

        Args:
            file: The file.
            advance: Called with the number of new bytes. It may raise to stop the fetch.
            afresh: Whether to ignore the client's cache.

        Raises:
            Mismatch: The content is not what the Hub announced. The file is removed.
            Passing: Another failure that a retry may solve.
            BadInput: The Hub refuses the request.
            OutsideFailure: The disk is full, or another failure.
        """
        what, hub = f"{file.path} of {self.repo} at {self.commit}", shown_endpoint(self.endpoint)
        try:
            fetched = Path(
                huggingface_hub.hf_hub_download(
                    self.repo,
                    file.path,
                    revision=self.commit,
                    endpoint=self.endpoint,
                    local_dir=self.staging,
                    # without a home directory, the client has no cache of its own to look into
                    cache_dir=self.staging / "cache" if constants.HF_HUB_CACHE.startswith("~") else None,
                    force_download=afresh,
                    tqdm_class=_bar_class(advance),
                )
            )
        except Exception as error:
            raise explain(error, what, self.repo, self.endpoint) from error
        if problem := mismatch(fetched, file):
            fetched.unlink()
            raise Mismatch(f"{what} from {hub} is not what was announced: {problem}")
        sync_file(fetched)
        fetched.replace(path_below(self.destination, file.path, self.repo))
        sync_directory(self.destination)


class Mismatch(Passing):
    """A fetched file does not have the content that the Hub announced."""


def mismatch(path: Path, file: RemoteFile) -> str | None:
    """Compares `path` with `file`, and reads all of it if its size is right.

    Returns:
        The difference, such as "size expected 4, got 3" or the same for its hash; None if there is none.
    """
    if not path.is_file():
        return "not a file"
    if (size := path.stat().st_size) != file.size:
        return f"size expected {file.size}, got {size}"
    if file.sha256 is not None:
        kind, expected, digest = "sha256", file.sha256, hashlib.sha256()
    else:
        kind, expected, digest = "git id", file.blob_id, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return None if digest.hexdigest() == expected else f"{kind} expected {expected}, got {digest.hexdigest()}"


def _bar_class(advance: Callable[[int], None]) -> Any:
    """Returns a stand-in for tqdm that passes on the bytes written to disk, and draws nothing."""

    class Bar:
        n = 0
        total = 0

        def __init__(self, *args: object, **options: object) -> None: ...
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...
        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        # Xet counts network traffic separately, unless the class has a method for it
        def update_transfer(self, n: float) -> None: ...
        def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...
        def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None: ...
        def refresh(self) -> None: ...
        def close(self) -> None: ...

    return Bar
