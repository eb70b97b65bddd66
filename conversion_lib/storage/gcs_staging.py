"""A tree in a bucket, written in place. It is whole when its first marker is there: last written, first removed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from conversion_lib.storage.lease import LEASE_NAME
from conversion_lib.storage.staging import Tree

if TYPE_CHECKING:
    from conversion_lib.storage.gcs import BucketLocation


class MarkerStaging:
    """A tree below `root`. `Staging` says what the methods are for."""

    def __init__(self, root: BucketLocation, tree: Tree) -> None:
        self.tree, self._root = tree, root

    @property
    def shown(self) -> str:
        return str(self._root)

    @property
    def final(self) -> BucketLocation:
        return self._root / self.tree.final

    @property
    def build(self) -> BucketLocation:
        return self.final

    @property
    def work(self) -> BucketLocation:
        return self._root / self.tree.work

    @contextmanager
    def drafts(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ferry-beside-") as name:
            yield Path(name)
            for path in sorted(Path(name).rglob("*")):
                if path.is_file():
                    (self._root / path.relative_to(name).as_posix()).write_first(path.read_bytes())

    def exists(self) -> bool:
        return self.tree.final in self._root.children()

    def whole(self) -> bool:
        return self.read(self.tree.markers[0]) is not None

    def read(self, name: str) -> bytes | None:
        return (self._root / name).read()

    def begun(self) -> bool:
        return self.tree.work in self._root.children()

    def building(self) -> bool:
        return not self.whole()

    def committing(self) -> bool:
        return False

    def strangers(self) -> list[str]:
        return sorted(self._root.children() - self.tree.ours - set(self.tree.guests))

    def prepare(self, needed_bytes: int) -> None:
        """Nothing: a bucket has room for all, and no directories."""

    def begin(self) -> None:
        for marker in self.tree.markers:
            self._root.remove([marker])
        self.clear()

    def restore(self) -> None:
        """Nothing: what is replaced is removed before the first write."""

    def commit(self) -> None:
        """Readers have seen the checkpoint since its marker was written."""
        self.clear()

    def clear(self) -> None:
        below = [f"{self.tree.work}/{path}" for path in self.work.below()] if self.whole() else self._root.below()
        ours = [path for path in below if self._is_ours(path)]
        # the notes of whose it is go last: a removal that is ended midway can be resumed
        last = [path for path in (self.tree.record, *self.tree.notes) if path in ours]
        self._root.remove(path for path in ours if path not in last)
        for path in last:
            self._root.remove([path])

    def _is_ours(self, path: str) -> bool:
        return path.partition("/")[0] in self.tree.ours and not path.startswith(f"{self.tree.work}/{LEASE_NAME}")
