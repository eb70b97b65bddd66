"""A MaxText checkpoint as what a conversion starts from: its weights, its config, and how it is laid out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from conversion_lib import catalog
from conversion_lib.cloud.place import stored_at
from conversion_lib.config import CONFIG_NAME, ModelConfig, load_config
from conversion_lib.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.identity import orbax_content
from conversion_lib.plan import Plan
from conversion_lib.progress import format_bytes
from conversion_lib.record import HF_DIR_NAME, CheckpointRecord, Origin, checkpoint_root, read_record
from conversion_lib.rules import Dims, Family
from conversion_lib.running import Job, bytes_in
from conversion_lib.sources.maxtext import MaxTextSource
from conversion_lib.stored_layout import MAXTEXTS, StoredLeaf, export_dims, scanned, stored_leaves


@dataclass(frozen=True)
class MaxTextInput:
    """A checkpoint that is open.

    hf: the directory with config.json and the tokenizer's files.
    scan_layers, maxtext: how its leaves are stored; the release is None where nothing tells it.
    record: what Ferry wrote beside it, None where Ferry did not write it.
    """

    source: MaxTextSource
    hf: Path
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
            weights=self.source.stored.items,
        )


def open_maxtext(
    checkpoint: Path, *, model: str | None, hf_config: Path | None, written_by: str | None, cache_bytes: int
) -> MaxTextInput:
    """Opens the checkpoint at DST, DST/0 or DST/0/items; what training needs besides the weights stays unread.

    hf_config: a directory with the model's config.json; None: `hf/` beside the checkpoint, which Ferry writes.
    model: a name of the catalogue, which then says the family. written_by: the release of MaxText that did, where the
    checkpoint does not tell.
    cache_bytes: what decoded chunks may take of the memory; two at least must fit, since a piece may need as many.
    Raises BadInput where it is no checkpoint, there is no config, or a chunk is too large.
    """
    if written_by is not None and written_by not in MAXTEXTS:
        raise BadInput(f"--written-by {written_by}: it is one of {', '.join(MAXTEXTS)}")
    record = read_record(checkpoint)
    source = MaxTextSource(checkpoint, cache_bytes=cache_bytes)
    _require_memory(source, cache_bytes)
    hf = hf_config or checkpoint_root(checkpoint) / HF_DIR_NAME
    if not (hf / CONFIG_NAME).is_file():
        raise BadInput(
            f"{hf} has no {CONFIG_NAME}: --hf-config names a directory with the model's config and tokenizer"
        )
    config = load_config(hf)
    named = catalog.model_named(model) if model else None
    known = named or record
    family = FAMILIES[known.family] if known else family_of(config)
    origin = record.origin if record else Origin(path=str(stored_at(checkpoint.absolute())))
    name = named.name if named else record.model_name if record else _name(origin)
    return MaxTextInput(
        source=source,
        hf=hf,
        config=config,
        family=family,
        model_name=name,
        scan_layers=scanned(source.tensors, family, export_dims(family, config), source.stored.scan_layers),
        maxtext=written_by or (record.target.maxtext if record else source.maxtext),
        record=record,
        origin=origin,
    )


def _name(origin: Origin) -> str:
    return catalog.published_name(origin.repo, Path(origin.path).name)


def _require_memory(source: MaxTextSource, cache_bytes: int) -> None:
    """Raises BadInput where a chunk, which is decoded as a whole, leaves no memory for another beside it."""
    for name, info in source.tensors.items():
        nbytes = math.prod(source.chunk_shape(name)) * itemsize(info.dtype)
        if 2 * nbytes > cache_bytes:
            raise BadInput(
                f"{info.file} is stored in chunks of {format_bytes(nbytes)}, and each is decoded as a whole: give "
                f"{2 * nbytes / cache_bytes:.1f} times the memory budget"
            )
