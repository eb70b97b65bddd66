"""What a training run wants its checkpoint to be, and how one that is there differs from it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.conversions.opening import known_directory
from conversion_lib.errors import BadInput
from conversion_lib.maxtext.names import TARGET_SETTINGS, is_model_name, model_of
from conversion_lib.on_the_fly.output import Foreign
from conversion_lib.record import CHOSEN_FIELDS, CheckpointRecord, Target

HUB_SECONDS = 30.0


def target_of(dtype: Any, **settings: Any) -> Target:
    """The Target of a run's settings; dtype by name, or as numpy, jax and MaxText have it.

    Raises BadInput for what Ferry does not write, naming the setting.
    """
    values = {**settings, "save_dtype": _dtype_name(dtype)}
    return Target.parse(values, lambda field: f"{TARGET_SETTINGS.get(field, field)}=")


def _dtype_name(dtype: Any) -> Any:
    """Text, where it can be had."""
    dtype = dtype.value if isinstance(dtype, Enum) else dtype
    if isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


@dataclass(frozen=True)
class Wanted:
    """What the checkpoint is to be made of. source: a repository, or the path of a directory."""

    source: str
    directory: Path | None
    model: str | None
    revision: str
    target: Target
    token: str | None

    @cached_property
    def commit(self) -> str | None:
        """The commit that `revision` names now; None where the Hub cannot tell."""
        if re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self.revision
        import huggingface_hub

        from conversion_lib.hub import hub_endpoint

        try:
            api = huggingface_hub.HfApi(hub_endpoint(), token=self.token)
            return api.model_info(self.source, revision=self.revision, timeout=HUB_SECONDS).sha
        except Exception:  # whatever the reason, the existing checkpoint stays valid
            return None

    def differences(self, record: CheckpointRecord, *, at_commit: bool) -> list[str]:
        """How a checkpoint that Ferry wrote is not what is wanted; at_commit: whether the Hub may be asked."""
        there, here = record.target, self.target
        pairs: dict[str, tuple[object, object]] = {
            TARGET_SETTINGS.get(field, field): (getattr(there, field), getattr(here, field)) for field in CHOSEN_FIELDS
        }
        if self.directory is None:
            pairs["source"] = (record.origin.repo or record.origin.path, self.source)
            asked = self.commit if at_commit else None
            if asked is not None and record.origin.repo == self.source:
                pairs["commit"] = (record.origin.commit, asked)
        elif (content := _content(self.directory)) is not None:
            same = record.identity.get("source") == content
            pairs["source"] = (self.source if same else f"other files, of {record.origin.path}", self.source)
        return _named(pairs)

    def differences_of_foreign(self, there: Foreign) -> list[str]:
        """The same of a checkpoint that MaxText wrote, as far as its metadata tell."""
        here = self.target
        pairs: dict[str, tuple[object, object]] = {
            "scan_layers": (there.scan_layers, here.scan_layers),
            TARGET_SETTINGS["ocdbt"]: (there.ocdbt, here.ocdbt),
            TARGET_SETTINGS["zarr3"]: (there.zarr3, here.zarr3),
        }
        if here.save_dtype not in there.dtypes:
            pairs[TARGET_SETTINGS["save_dtype"]] = (" and ".join(sorted(there.dtypes)), here.save_dtype)
        return _named({name: pair for name, pair in pairs.items() if pair[0] is not None})


def _named(pairs: dict[str, tuple[object, object]]) -> list[str]:
    return [f"{name}: {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]


def wanted(model: str, revision: str, target: Target, token: str | None) -> Wanted:
    """Raises BadInput where `model` is no model, repository or directory."""
    if is_model_name(model):
        named = model_of(model)
        return Wanted(named.repo, None, named.name, revision, target, token)
    if "/" not in model and not Path(model).expanduser().is_dir():
        model_of(model)  # raises, with the nearest names
    directory = known_directory(model)
    source = model if directory is None else str(directory.absolute())
    return Wanted(source, directory and directory.absolute(), None, revision, target, token)


def _content(directory: Path) -> str | None:
    """What is known of a directory's weights without reading them, as a record keeps it; None where they are gone."""
    from conversion_lib.sources.fingerprint import source_content
    from conversion_lib.sources.safetensors import SafetensorsSource

    try:
        return json.dumps(source_content(SafetensorsSource(directory)))
    except BadInput:
        return None
