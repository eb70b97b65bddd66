"""Where a training run's checkpoint is to lie, a directory or a prefix in a bucket, and what lies there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conversion_lib.errors import BadInput
from conversion_lib.record import COMMIT_NAME, ON_THE_FLY_LEASE, CheckpointRecord
from conversion_lib.runs.trees import maxtext_staging
from conversion_lib.runs.workspace import finished
from conversion_lib.sources.orbax import open_orbax
from conversion_lib.storage.lease import Lease
from conversion_lib.storage.locations import location


@dataclass(frozen=True)
class Foreign:
    """What its own metadata tell of a checkpoint that Ferry did not write; None: not told."""

    scan_layers: bool | None
    ocdbt: bool | None
    zarr3: bool | None
    dtypes: frozenset[str]


class Output:
    """MaxText's `base_output_directory`, on storage that all hosts share. Raises BadInput for another kind of URL."""

    def __init__(self, destination: str | Path) -> None:
        text = str(destination)
        self._root = location(text if "://" in text else Path(text).expanduser().absolute())
        self._staging = maxtext_staging(str(self._root), alone=False)

    @property
    def destination(self) -> str:
        return str(self._root)

    @property
    def items(self) -> Path | str:
        """What MaxText is to load."""
        return (self._root / "0/items").handle

    def found(self) -> CheckpointRecord | Foreign | None:
        """The checkpoint that is whole here. Raises BadInput for a half-written one that is not Ferry's."""
        items = self._root / "0/items"
        if not self._staging.whole() or not items.children():
            return None
        if (record := finished(self._staging)) is not None:
            return record
        if self._staging.committing():
            return None
        if all(self._staging.read(marker) is None for marker in self._staging.tree.markers):
            raise BadInput(
                f"{self.items} is half-written, by something else than ferry: it has no {COMMIT_NAME}. Remove "
                f"{self._staging.final}, or give another directory"
            )
        source = open_orbax(items)
        dtypes = frozenset(info.dtype for path, info in source.tensors.items() if path.startswith("params/"))
        return Foreign(source.scan_layers, source.ocdbt, source.zarr3, dtypes)

    def lease(self, on_lost: Callable[[], None]) -> Lease:
        """The right to convert, which one process of all that share the output holds."""
        return (self._root / ON_THE_FLY_LEASE).lease(on_lost)
