"""A MaxText checkpoint as what a conversion starts from: its weights, its config, and how it is laid out."""

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
    """A checkpoint that is open.

    hf: the directory with config.json and the tokenizer's files.
    scan_layers, maxtext: how its leaves are stored; the release is None where nothing tells it.
    record: what Ferry wrote beside it, None where Ferry did not write it.
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

    @cached_property
    def dims(self) -> Dims:
        return export_dims(self.family, self.config)

    def leaves(self) -> list[StoredLeaf]:
        """Every leaf that the family's table expects. Raises BadInput as `stored_leaves` does."""
        return stored_leaves(
            self.source.tensors,
            self.config,
            self.family,
            self.dims,
            scan_layers=self.scan_layers,
            maxtext=self.maxtext,
        )

    def identity(self, **written: str) -> dict[str, str]:
        """What a run that reads it is known by; `written`: what the run makes of it."""
        return {
            "source": json.dumps(orbax_content(self.source.stored.items)),
            "config": json.dumps(self.config.raw, sort_keys=True),
            "family": self.family.name,
            "written_by": self.maxtext or "",
            **written,
        }

    def job(self, plan: Plan, config: ModelConfig, chunk_limit: int) -> Job:
        """The job of a plan that was made of it; `config` goes along with what is written."""
        return Job(
            source=self.source,
            directory=self.hf,
            config=config,
            origin=self.origin,
            plan=replace(plan, dropped=(*self.source.not_read, *plan.dropped)),
            bytes_in=bytes_in(plan, self.source),
            chunk_limit=chunk_limit,
            name=str(self.source.stored.items),
            content=lambda: orbax_content(self.source.stored.items),
        )
