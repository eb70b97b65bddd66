"""The output of plan, inspect and models: data for scripts, tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from conversion_lib.conversions.compare import opened_checkpoint
from conversion_lib.core.tensors import Source
from conversion_lib.engine.limits import peak_estimate
from conversion_lib.maxtext.model import arguments, model_of_job, warnings
from conversion_lib.models.catalog import MODELS
from conversion_lib.models.verified import LAYOUTS, LEGEND, load
from conversion_lib.plan.job import Job, disk_bytes
from conversion_lib.progress import format_bytes
from conversion_lib.sources.orbax import OrbaxSource

SHOWN = 40
"""Longest list of arrays in the text of a plan."""


def plan_summary(job: Job, budget: int, threads: int | None) -> dict[str, Any]:
    """Returns the plan as `ferry plan --json` prints it.

    Args:
        job: The planned conversion.
        budget: The memory budget in bytes.
        threads: Worker threads. None: one per core, up to 16.
    """
    plan, model = job.plan, model_of_job(job)
    arrays = [
        {
            "path": array.path,
            "shape": list(array.shape),
            "dtype": array.dtype,
            "chunk_shape": list(array.chunk_shape),
            "sources": [part.tensor for part in array.sources],
        }
        for array in plan.arrays
    ]
    return {
        "family": plan.family,
        "model": plan.model_name,
        "fingerprint": plan.fingerprint,
        "arrays": arrays,
        "bytes_in": job.bytes_in,
        "bytes_out": plan.bytes_out,
        "peak_bytes": peak_estimate(plan, budget, threads) + job.resident_bytes,
        "disk_bytes": disk_bytes(plan),
        "exact": plan.exact,
        "maxtext": {"settings": model.run_settings, "differs": model.reason} if model else None,
        "warnings": [*job.notes, *plan.dropped, *warnings(model)],
    }


def plan_text(job: Job, summary: dict[str, Any]) -> list[RenderableType]:
    """Returns a plan's summary as a table and lines."""
    table = Table(title=f"{summary['model']} ({summary['family']})")
    for name in ("array", "shape", "dtype", "chunk", "from"):
        table.add_column(name, overflow="fold")
    for array in summary["arrays"][:SHOWN]:
        origin = array["sources"][0] + (f" … ({len(array['sources'])})" if len(array["sources"]) > 1 else "")
        table.add_row(
            array["path"].removeprefix("params/params/"),
            str(array["shape"]),
            array["dtype"],
            str(array["chunk_shape"]),
            origin,
        )
    more = len(summary["arrays"]) - SHOWN
    lines = [f"… and {more} more arrays"] if more > 0 else []
    lines.append(
        f"{len(summary['arrays'])} arrays; "
        f"{format_bytes(summary['bytes_in'])} in, {format_bytes(summary['bytes_out'])} out; "
        f"at most {format_bytes(summary['peak_bytes'])} of memory and {format_bytes(summary['disk_bytes'])} of disk"
    )
    if summary["maxtext"]:
        lines.append(f"MaxText runs it with {' '.join(arguments(summary['maxtext']['settings']))}")
    return [table, *lines, *summary["warnings"]]


def inspection(path: Path | str) -> dict[str, Any]:
    """Describes a checkpoint of either kind, in a directory or at gs://bucket/prefix, from headers and metadata alone.

    Raises:
        BadInput: There is no checkpoint.
        OutsideFailure: Cloud Storage failed.
    """
    with opened_checkpoint(path) as (kind, source):
        return _inspection(kind, source)


def _inspection(kind: str, source: Source) -> dict[str, Any]:
    leaves = []
    for name, info in sorted(source.tensors.items()):
        leaf: dict[str, Any] = {"path": name, "shape": list(info.shape), "dtype": info.dtype}
        if isinstance(source, OrbaxSource):
            leaf["chunk_shape"] = list(source.chunk_shape(name))
        else:
            leaf["file"] = Path(info.file).name
        leaves.append(leaf)
    data: dict[str, Any] = {
        "kind": kind,
        "bytes": sum(info.nbytes for info in source.tensors.values()),
        "leaves": leaves,
    }
    if isinstance(source, OrbaxSource):
        metadata = source.metadata.model_dump(exclude={"tree_metadata"}, exclude_unset=True)
        data["metadata"] = {**metadata, "scan_layers": source.scan_layers}
    return data


def inspection_text(data: dict[str, Any]) -> list[RenderableType]:
    """Returns an inspection as a table and lines."""
    last = "chunk_shape" if data["kind"] == "maxtext" else "file"
    table = Table()
    for name in ("leaf", "shape", "dtype", last.replace("_shape", "")):
        table.add_column(name, overflow="fold")
    for leaf in data["leaves"]:
        table.add_row(leaf["path"], str(leaf["shape"]), leaf["dtype"], str(leaf[last]))
    lines = [f"{key}: {value}" for key, value in data.get("metadata", {}).items()]
    return [table, f"{len(data['leaves'])} leaves, {format_bytes(data['bytes'])}", *lines]


def models() -> dict[str, Any]:
    """Returns the catalogue, with what `make parity-all` verified for each family against the real MaxText."""
    seen = load()
    rows = [
        {
            "name": model.name,
            "family": model.family,
            "repo": model.repo,
            "also": list(model.also),
            "verified": {layout: found.model_dump() for layout, found in seen.families.get(model.family, {}).items()},
        }
        for model in MODELS
    ]
    return {"commit": seen.commit, "date": seen.date, "versions": seen.versions, "models": rows}


def models_text() -> list[RenderableType]:
    """Returns the catalogue as a table, with a legend."""
    seen = load()
    table = Table("model", "family", "Hub", *LAYOUTS)
    for model in MODELS:
        table.add_row(model.name, model.family, model.repo, *(seen.of(model.family, layout) for layout in LAYOUTS))
    return [table, seen.origin, *LEGEND]
