"""A directory as a repository on the Hub: its files with their hashes, its commit, and the Hub's JSON for both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".model")
LFS_BYTES = 10 << 20
"""Larger files are in Git LFS whatever their name, as on the Hub."""
BLOCK = 1 << 20


@dataclass(frozen=True)
class HubFile:
    """A served file.

    Attributes:
        path: Within the repository.
        source: The file on disk.
        size: Bytes.
        blob_id: Hex id of its git blob; for a file in Git LFS, that of the pointer.
        sha256: Hex digest of a file in Git LFS. None: the file is not in LFS.
    """

    path: str
    source: Path
    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class HubRepo:
    """A directory as a repository. `commit`, hex, depends only on the names and contents of the files, by path."""

    name: str
    commit: str
    files: dict[str, HubFile]


def git_blob_id(content_size: int, update: Callable[[Any], None]) -> str:
    """The hex id of a git blob of `content_size` bytes. `update` feeds these bytes to the hash that it gets."""
    digest = hashlib.sha1(f"blob {content_size}\0".encode(), usedforsecurity=False)
    update(digest)
    return digest.hexdigest()


def _feed(path: Path) -> Callable[[Any], None]:
    def update(digest: Any) -> None:
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)

    return update


def _index_file(root: Path, source: Path) -> HubFile:
    path, size = source.relative_to(root).as_posix(), source.stat().st_size
    if not (path.endswith(LFS_SUFFIXES) or size > LFS_BYTES):
        return HubFile(path, source, size, git_blob_id(size, _feed(source)), None)
    content = hashlib.sha256()
    _feed(source)(content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{content.hexdigest()}\nsize {size}\n".encode()
    return HubFile(path, source, size, git_blob_id(len(pointer), lambda d: d.update(pointer)), content.hexdigest())


def index_repo(name: str, root: Path) -> HubRepo:
    """Lists and hashes all files under `root` except hidden ones."""
    sources = sorted(p for p in root.rglob("*") if p.is_file())
    files = [_index_file(root, p) for p in sources if not any(x.startswith(".") for x in p.relative_to(root).parts)]
    listing = json.dumps([[f.path, f.blob_id] for f in files]).encode()
    commit = hashlib.sha1(listing, usedforsecurity=False).hexdigest()
    return HubRepo(name, commit, {f.path: f for f in files})


def _lfs(file: HubFile, key: str) -> dict[str, object]:
    return {} if file.sha256 is None else {"lfs": {key: file.sha256, "size": file.size, "pointerSize": 134}}


def model_info(repo: HubRepo) -> dict[str, object]:
    """Makes the answer to GET /api/models/REPO, with the sizes and hashes of the files."""
    siblings = [
        {"rfilename": f.path, "size": f.size, "blobId": f.blob_id, **_lfs(f, "sha256")} for f in repo.files.values()
    ]
    return {
        "_id": repo.commit[:24],
        "id": repo.name,
        "modelId": repo.name,
        "sha": repo.commit,
        "private": False,
        "gated": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


def refs(repo: HubRepo, tags: Mapping[str, str]) -> dict[str, object]:
    """Makes the answer to GET /api/models/REPO/refs. `tags`: commits by tag."""

    def listed(kind: str, commits: Mapping[str, str]) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in commits.items()
        ]

    return {"branches": listed("heads", {"main": repo.commit}), "tags": listed("tags", tags), "converts": []}


def tree_entry(file: HubFile) -> dict[str, object]:
    """Makes the entry of a file in the answer to GET /api/models/REPO/tree/REVISION."""
    return {"type": "file", "path": file.path, "size": file.size, "oid": file.blob_id, **_lfs(file, "oid")}
