"""Symbolic links: none is followed out of a source, and none at all among Ferry's own files.

A repository that was cloned, or an archive that was unpacked, may hold a link to anything on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.storage.names import OWN_PREFIX, is_hidden

SNAPSHOTS, BLOBS = "snapshots", "blobs"
"""In the cache of the Hub's client, a commit's directory is `snapshots/<commit>`, of links to the files in `blobs`."""


def refuse_links_out(directory: Path, *, within: Path | None = None, recursive: bool = True) -> None:
    """Raises BadInput where a link in `directory` leads out of it: nothing is read, copied or published through one.

    Of a snapshot in a cache of the Hub's client, the `blobs` of the same repository are inside.

    Args:
        directory: What is about to be read. Nothing is refused where there is none.
        within: What the links may not lead out of, if that is more than `directory`; then `directory` is in it, and
            may not lead out of it either.
        recursive: Also what lies deeper. If not, hidden files of others and directories are passed over, too: those
            are not read.
    """
    inside = _inside(within or directory)
    links = [directory] if within is not None and directory.is_symlink() else []
    for path in [*links, *_links(directory, recursive=recursive)]:
        target = Path(os.path.realpath(path))
        passed_over = not recursive and path != directory and _is_passed_over(path)
        if not passed_over and not any(target.is_relative_to(root) for root in inside):
            raise BadInput(
                f"{path} is a symbolic link that leads out of {within or directory}: put the file itself there, or "
                "give the directory that holds it"
            )


def refuse_links_in(own: Path) -> None:
    """Raises BadInput where `own`, a directory of Ferry's, is a link, or has one in it or below.

    Ferry makes no links there. Through one, it would write or remove what is somebody else's.
    """
    for path in [own] if own.is_symlink() else _links(own, recursive=True):
        raise BadInput(f"{path} is a symbolic link among ferry's own files, where it follows none: remove it")


def _inside(directory: Path) -> list[Path]:
    """The real directories that count as inside of `directory`."""
    root = Path(os.path.realpath(directory))
    for parent in (root, *root.parents):
        blobs = parent.parent.parent / BLOBS
        if parent.parent.name == SNAPSHOTS and blobs.is_dir() and not blobs.is_symlink():
            return [root, blobs]
    return [root]


def _links(directory: Path, *, recursive: bool) -> Iterator[Path]:
    """Every link in a directory and below."""
    pending = [directory]
    while pending:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    yield Path(entry.path)
                elif recursive and entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))


def _is_passed_over(path: Path) -> bool:
    return path.is_dir() or (is_hidden(path.name) and not path.name.startswith(OWN_PREFIX))
