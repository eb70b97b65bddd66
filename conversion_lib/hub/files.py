"""One file of a Hub repository: fetched with the client, checked against what the Hub says of it, put in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from pydantic import BaseModel, ConfigDict

from conversion_lib.core.retry import Passing
from conversion_lib.hub.errors import explain, shown_endpoint
from conversion_lib.storage.files import sync_directory, sync_file


class RemoteFile(BaseModel):
    """A file on the Hub: bytes, the SHA-256 of its content where it is in LFS or Xet, else its git blob id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches files of one repository at one commit into `destination`, by way of `staging` on the same disk."""

    repo: str
    commit: str
    endpoint: str
    staging: Path
    destination: Path

    def fetch(self, file: RemoteFile, advance: Callable[[int], None], *, afresh: bool = False) -> None:
        """Fetches, checks, syncs and places `file`; `advance` is called with bytes as they come.

        afresh: not from the client's own cache. Raises Passing for what another try may mend, a wrong content
        (Mismatch) among it, and leaves nothing behind then.
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
        fetched.replace(self.destination / file.path)
        sync_directory(self.destination)


class Mismatch(Passing):
    """A file came with another content than the Hub announced."""


def mismatch(path: Path, file: RemoteFile) -> str | None:
    """What of `path` differs from `file`: "size expected ..., got ..." or the same of its hash; None if nothing."""
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
    """What the client takes for tqdm: hands on the bytes that reach the disk, and draws nothing."""

    class Bar:
        n = 0
        total = 0

        def __init__(self, *args: object, **options: object) -> None: ...
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...
        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        # Xet counts what comes over the network apart, unless the class has a method for it
        def update_transfer(self, n: float) -> None: ...
        def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...
        def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None: ...
        def refresh(self) -> None: ...
        def close(self) -> None: ...

    return Bar
