"""The files of a repository that a job needs: the weights that transformers reads, and the small files."""

from __future__ import annotations

import tempfile
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from conversion_lib.core.retry import Backoff
from conversion_lib.errors import BadInput
from conversion_lib.hub.files import Fetcher, Resolved, hub_endpoint, mismatch
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.record import WORK_NAME, RemoteFile
from conversion_lib.sources.weight_files import INDEX_NAME, SINGLE_NAME, SUFFIX, weight_files

BESIDE = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
"""Small files at the top level of a repository that a job may need."""
NOT_BESIDE = ("consolidated*", "*.index.json", "adapter_config.json")
"""A second copy of the weights, indexes (the one that is needed is added later), and the config of an adapter."""
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
"""Weights that the error names if a repository has no safetensors. Pickled weights are never fetched."""


def needed_files(
    resolved: Resolved,
    directory: Path | None = None,
    *,
    leave_index: bool = False,
    backoff: Backoff | None = None,
    reporter: Reporter = SILENT,
) -> list[RemoteFile]:
    """Returns the files of the repository that a job needs. The index must be read to know which weights it names.

    Args:
        resolved: The commit with all its files.
        directory: Where the index may be already.
        leave_index: Whether to leave the index in `directory` if it was fetched.
        backoff: How often to retry.
        reporter: Told about weights that are not needed.

    Raises:
        BadInput: The repository has no safetensors weights that transformers reads, or the index is malformed.
        OutsideFailure: The Hub fails in all tries of `backoff`.
    """
    files = {file.path: file for file in resolved.files if "/" not in file.path}
    there = {path for path in files if path.endswith(SUFFIX)}
    if not there:
        raise BadInput(_no_safetensors(resolved))
    index = None
    if INDEX_NAME in files:
        # where model.safetensors comes first, what the index says does not matter
        index = b"" if SINGLE_NAME in there else _index(resolved, files[INDEX_NAME], directory, backoff or Backoff())
        if leave_index and directory is not None and SINGLE_NAME not in there:
            (directory / INDEX_NAME).write_bytes(index)
    chosen = weight_files(f"{resolved.repo} at {resolved.commit}", there, index)
    for note in chosen.notes:
        reporter.say(f"{resolved.repo}: {note}")
    with_index = [files[INDEX_NAME]] if chosen.index else []
    return sorted([*side_files(resolved), *with_index, *(files[name] for name in chosen.names)], key=lambda f: f.path)


def side_files(resolved: Resolved) -> list[RemoteFile]:
    """Returns the files that are no weights: config, tokenizer, licence."""
    return [
        file
        for file in resolved.files
        if "/" not in file.path and _matches(file.path, BESIDE) and not _matches(file.path, NOT_BESIDE)
    ]


def _index(resolved: Resolved, file: RemoteFile, directory: Path | None, backoff: Backoff) -> bytes:
    if directory is not None and mismatch(directory / file.path, file) is None:
        return (directory / file.path).read_bytes()
    with tempfile.TemporaryDirectory(prefix="ferry-index-") as name:
        path = Path(name)
        fetcher = Fetcher(resolved.repo, resolved.commit, hub_endpoint(), path / WORK_NAME, path)
        backoff.run(partial(fetcher.fetch, file, lambda nbytes: None, afresh=True))
        return (path / file.path).read_bytes()


def _no_safetensors(resolved: Resolved) -> str:
    weights = [f"{f.path} ({format_bytes(f.size)})" for f in resolved.files if _matches(f.path, OTHER_WEIGHTS)]
    shown = ", ".join(weights[:4] or [file.path for file in resolved.files[:4]]) or "nothing"
    more = ", ..." if len(weights or resolved.files) > 4 else ""
    return (
        f"{resolved.repo} at {resolved.commit} has no safetensors at its top level; it has {shown}{more}. Pickled"
        " weights are never loaded: choose a revision or a repository with safetensors"
    )


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)
