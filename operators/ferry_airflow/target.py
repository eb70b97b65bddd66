"""The options of a stage that say what to write, and the command line that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversion_lib.record import Target

TARGET_FIELDS = ("scan_layers", "save_dtype", "ocdbt", "zarr3", "maxtext")


def target_of(values: Mapping[str, Any]) -> Target:
    """The target that a stage's parameters name. Raises BadInput for a value that there is not."""
    return Target.parse({name: values[name] for name in TARGET_FIELDS})


def target_options(target: Target) -> list[str]:
    """The target as a command line takes it."""
    return [
        "--scan-layers" if target.scan_layers else "--no-scan-layers",
        "--save-dtype",
        target.save_dtype,
        "--ocdbt" if target.ocdbt else "--no-ocdbt",
        "--zarr3" if target.zarr3 else "--no-zarr3",
        "--maxtext",
        target.maxtext,
    ]
