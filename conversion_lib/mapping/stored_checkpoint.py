"""A MaxText checkpoint as the input of a conversion: its weights, its config, and its layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property

from conversion_lib.mapping.rules import Family
from conversion_lib.mapping.stored_leaves import StoredLeaf, export_dims, stored_leaves
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.job import Job, bytes_in
from conversion_lib.plan.plan import Plan
from conversion_lib.record import CheckpointRecord, Origin
from conversion_lib.sources.fingerprint import orbax_content
from conversion_lib.sources.joined import Dims
from conversion_lib.sources.maxtext import MaxTextSource
from conversion_lib.storage.interface import Location


@dataclass(frozen=True)
class MaxTextInput:
    """An open checkpoint.

    Attributes:
        source: The weights.
        hf: The directory with config.json and the tokenizer's files.
        config: That config.json.
        family: The family, whose table describes the leaves.
        model_name: The model's name in the record.
        scan_layers: Whether the layers are stacked.
        maxtext: The MaxText release that wrote the leaves; None if it is not known.
        record: Ferry's record next to the checkpoint; None if Ferry did not write the checkpoint.
        origin: Where the weights came from.
    """

    source: MaxTextSource
    hf: Location
    config: ModelConfig
    family: Family
    model_name: str
    scan_layers: bool
    maxtext: str | None
    record: CheckpointRecord | None
    origin: Origin
    notes: tuple[str, ...] = ()
    """As a Job has them."""

    @cached_property
    def dims(self) -> Dims:
        """The sizes for the names of the published checkpoint, as `export_dims`."""
        return export_dims(self.family, self.config)

    def leaves(self) -> list[StoredLeaf]:
        """Finds every leaf of the family's table.

        Raises:
            BadInput: As `stored_leaves` raises it.
        """
        return stored_leaves(
            self.source.tensors,
            self.config,
            self.family,
            self.dims,
            scan_layers=self.scan_layers,
            maxtext=self.maxtext,
        )

    def identity(self, **written: str) -> dict[str, str]:
        """Returns the identity of a plan that reads the checkpoint.

        Args:
            **written: More entries, which describe what the plan writes.
        """
        return {
            "source": json.dumps(orbax_content(self.source.stored.items)),
            "config": json.dumps(self.config.raw, sort_keys=True),
            "family": self.family.name,
            "written_by": self.maxtext or "",
            **written,
        }

    def job(self, plan: Plan, config: ModelConfig, chunk_limit: int) -> Job:
        """Returns the job for a plan that reads the checkpoint.

        Args:
            plan: The plan.
            config: The config.json to write.
            chunk_limit: The most bytes of a chunk.
        """
        return Job(
            source=self.source,
            directory=self.hf,
            config=config,
            origin=self.origin,
            plan=replace(plan, dropped=(*self.source.not_read, *plan.dropped)),
            bytes_in=bytes_in(plan, self.source),
            chunk_limit=chunk_limit,
            name=str(self.source.stored.items),
            notes=self.notes,
            content=lambda: orbax_content(self.source.stored.items),
            source_dtypes=lambda: self.record.source_dtypes if self.record else None,
        )
