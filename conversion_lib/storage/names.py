"""Names that somebody else chose, as paths: by one function, so that none leaves the directory that it is put in.

A tensor's leaf, a shard, a file of a repository, an object in a bucket, a commit, a model: all of them are names from
outside, and all of them become a part of a path here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from conversion_lib.errors import BadInput

OWN_PREFIX = ".ferry"
"""Begins the names of Ferry's own files and directories. No file of a repository or a bucket is written under one."""
LONGEST_PART = 255
"""Bytes of a file's name on nearly every file system."""
LONGEST_NAME = 1024
"""Bytes of a path from outside, as Cloud Storage has it for an object."""
DRIVE = re.compile(r"[A-Za-z]:")
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, halves of characters, and separators of lines."""


def safe_path(name: str, where: object) -> str:
    """`name`, a relative path with `/`, where it stays below whatever directory it is put in, on any system.

    Args:
        name: What somebody else chose.
        where: What has that name, for a message: a checkpoint, a listing, a record.

    Raises:
        BadInput: It is empty, absolute, or has a part that is empty, `.` or `..`; a backslash or a drive; a control
            character or half of one; or it is longer than file systems and buckets take.
    """
    if (problem := _problem(name)) is not None:
        raise BadInput(f"{where} has the name {shown(name)}, which {problem}: ferry makes no path of it")
    return name


def is_safe(name: str) -> bool:
    """Whether `safe_path` would take the name."""
    return _problem(name) is None


def safe_part(name: str, where: object) -> str:
    """`safe_path` of a name that is one part of a path: a commit, a model, a file beside others."""
    if "/" in safe_path(name, where):
        raise BadInput(f"{where} has the name {shown(name)}, which names another directory: ferry makes no path of it")
    return name


def path_below(root: Path, name: str, where: object = None) -> Path:
    """The path of `name` below the directory `root`. Raises BadInput as `safe_path` does."""
    return root / safe_path(name, root if where is None else where)


def require_distinct(names: Iterable[str], where: object) -> None:
    """Raises BadInput where two names would be one file, or one is a file and a directory.

    Some file systems take names for the same that differ in capitals, or in how an accent is encoded.
    """
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(_folded(name), name)) != name:
            raise BadInput(f"{where} has {shown(other)} and {shown(name)}, which many file systems take for one file")
    for name in seen.values():
        parts = name.split("/")
        for count in range(1, len(parts)):
            if (file := seen.get(_folded("/".join(parts[:count])))) is not None:
                raise BadInput(f"{where} has {shown(name)}, and {shown(file)} is a file: it cannot be a directory too")


def is_hidden(name: str) -> bool:
    """Whether a file beside others is hidden, as all of Ferry's own are."""
    return name.startswith(".")


def shown(name: object) -> str:
    """A name from outside as a message has it: quoted, in ASCII, and not too long."""
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _problem(name: str) -> str | None:
    """What is wrong with a name, None where nothing is."""
    if not name:
        return "is empty"
    if any(unicodedata.category(character) in UNPRINTABLE for character in name):
        return "has a control character"
    if "\\" in name or DRIVE.match(name):
        return "is a path of another system"
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        return "leads out of its directory"
    if "" in parts or "." in parts:
        return "has an empty part"
    if len(name.encode()) > LONGEST_NAME or any(len(part.encode()) > LONGEST_PART for part in parts):
        return "is too long"
    return None
