"""A directory as a repository on the Hub: its files with their hashes, its commit, and how the Hub describes both."""

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
    """A served file: `blob_id` is its git id (of the LFS pointer where `sha256` is set)."""

    path: str
    source: Path
    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class HubRepo:
    """A directory as the Hub shows it: `commit` follows from the files' names and contents alone."""

    name: str
    commit: str
    files: dict[str, HubFile]


def git_blob_id(content_size: int, update: Callable[[Any], None]) -> str:
    """The id git gives a blob of `content_size` bytes that `update` feeds to the hash it is handed."""
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
    """Lists and hashes every file under `root`, hidden ones left out."""
    sources = sorted(p for p in root.rglob("*") if p.is_file())
    files = [_index_file(root, p) for p in sources if not any(x.startswith(".") for x in p.relative_to(root).parts)]
    listing = json.dumps([[f.path, f.blob_id] for f in files]).encode()
    commit = hashlib.sha1(listing, usedforsecurity=False).hexdigest()
    return HubRepo(name, commit, {f.path: f for f in files})


def _lfs(file: HubFile, key: str) -> dict[str, object]:
    return {} if file.sha256 is None else {"lfs": {key: file.sha256, "size": file.size, "pointerSize": 134}}


def model_info(repo: HubRepo) -> dict[str, object]:
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
    def listed(kind: str, commits: Mapping[str, str]) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in commits.items()
        ]

    return {"branches": listed("heads", {"main": repo.commit}), "tags": listed("tags", tags), "converts": []}


def tree_entry(file: HubFile) -> dict[str, object]:
    return {"type": "file", "path": file.path, "size": file.size, "oid": file.blob_id, **_lfs(file, "oid")}
