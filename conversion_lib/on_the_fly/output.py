"""The output directory of a training run, or its prefix in a bucket, and the checkpoint that exists there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.record import COMMIT_NAME, ON_THE_FLY_LEASE, CheckpointRecord
from conversion_lib.runs.trees import maxtext_staging
from conversion_lib.runs.workspace import finished
from conversion_lib.sources.orbax import open_orbax
from conversion_lib.storage.files import expanded
from conversion_lib.storage.lease import Lease
from conversion_lib.storage.locations import local_path, location

EXPECTED = "a directory or gs://bucket/prefix"


@dataclass(frozen=True)
class Foreign:
    """What the metadata of a checkpoint say that Ferry did not write. None: they do not say."""

    scan_layers: bool | None
    ocdbt: bool | None
    zarr3: bool | None
    dtypes: frozenset[str]


class Output:
    """MaxText's `base_output_directory`, on storage that all hosts share.

    Args:
        destination: A directory or gs://bucket/prefix. Another URL raises BadInput.
    """

    def __init__(self, destination: str | Path) -> None:
        text = str(destination)
        self._root = location(text if "://" in text else expanded(local_path(text, EXPECTED)).absolute())
        self._staging = maxtext_staging(str(self._root), alone=False)

    @property
    def destination(self) -> str:
        """The absolute path, or the URL."""
        return str(self._root)

    @property
    def items(self) -> Path | str:
        """What MaxText loads: a path, or a URL as text."""
        return (self._root / "0/items").handle

    def found(self) -> CheckpointRecord | Foreign | None:
        """Returns the record of the complete checkpoint here, or its metadata if Ferry did not write it.

        Raises:
            BadInput: There is a half-written checkpoint that is not Ferry's, or a damaged record.
        """
        items = self._root / "0/items"
        if not self._staging.whole() or not items.children():
            return None
        if (record := finished(self._staging)) is not None:
            return record
        if self._staging.committing():
            return None
        if all(self._staging.read(marker) is None for marker in self._staging.tree.markers):
            raise BadInput(
                f"{self.items} was half-written by another program: it has no {COMMIT_NAME}. Remove "
                f"{self._staging.final}, or give another directory"
            )
        source = open_orbax(items)
        dtypes = frozenset(info.dtype for path, info in source.tensors.items() if path.startswith("params/"))
        return Foreign(source.scan_layers, source.ocdbt, source.zarr3, dtypes)

    def lease(self, on_lost: Callable[[], None]) -> Lease:
        """Returns the lease to convert, which one of the processes that share the output holds."""
        return (self._root / ON_THE_FLY_LEASE).lease(on_lost)
