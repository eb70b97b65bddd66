"""The checkpoint that a training run wants, and how an existing one differs from it."""

from __future__ import annotations

import json
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
from conversion_lib.record import CHOSEN_FIELDS, CheckpointRecord, Target, is_commit
from conversion_lib.storage.files import expanded

HUB_SECONDS = 30.0


def target_of(dtype: Any, **settings: Any) -> Target:
    """Builds the Target from a run's settings.

    Args:
        dtype: A name, or numpy's, jax's or MaxText's object.
        **settings: Other fields of Target.

    Raises:
        BadInput: Ferry cannot write it. The message names the setting.
    """
    values = {**settings, "save_dtype": _dtype_name(dtype)}
    return Target.parse(values, lambda field: f"{TARGET_SETTINGS.get(field, field)}=")


def _dtype_name(dtype: Any) -> Any:
    """Returns the dtype's name; what has none is returned as it is, for the error message."""
    dtype = dtype.value if isinstance(dtype, Enum) else dtype
    if isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


@dataclass(frozen=True)
class Wanted:
    """The checkpoint that a run wants.

    Attributes:
        source: A Hub repository, or the path of a directory.
        directory: The source's directory. None: it is a repository.
        model: A name in the catalogue. None: config.json determines the family.
        revision: Branch, tag or commit of the repository.
        target: What is to be written.
        token: The Hub's token. None: the client's own.
    """

    source: str
    directory: Path | None
    model: str | None
    revision: str
    target: Target
    token: str | None

    @cached_property
    def commit(self) -> str | None:
        """The commit that `revision` names now; None if the Hub does not answer."""
        if is_commit(self.revision):
            return self.revision
        import huggingface_hub

        from conversion_lib.hub import hub_endpoint

        try:
            api = huggingface_hub.HfApi(hub_endpoint(), token=self.token)
            return api.model_info(self.source, revision=self.revision, timeout=HUB_SECONDS).sha
        except Exception:  # whatever the reason, the existing checkpoint stays valid
            return None

    def differences(self, record: CheckpointRecord, *, at_commit: bool) -> list[str]:
        """Describes how a checkpoint that Ferry wrote differs from what is wanted.

        Args:
            record: The checkpoint's record.
            at_commit: Whether to ask the Hub for the revision's commit and compare it too.

        Returns:
            One text for each difference. Empty: the checkpoint fits.
        """
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
        """Describes the same for a checkpoint that Ferry did not write, as far as its metadata say."""
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
    """Finds the source for a model.

    Args:
        model: A model's name, a Hub repository, or a directory.
        revision: Branch, tag or commit of the repository.
        target: What is to be written.
        token: The Hub's token. None: the client's own.

    Raises:
        BadInput: `model` is none of the three. For an unknown name, the message suggests the nearest ones.
    """
    if is_model_name(model):
        named = model_of(model)
        return Wanted(named.repo, None, named.name, revision, target, token)
    if "/" not in model and not expanded(model).is_dir():
        model_of(model)  # raises, with the nearest names
    directory = known_directory(model)
    source = model if directory is None else str(directory.absolute())
    return Wanted(source, directory and directory.absolute(), None, revision, target, token)


def _content(directory: Path) -> str | None:
    """Returns the content of a directory's weights as a record keeps it, from headers alone; None if they are gone."""
    from conversion_lib.sources.fingerprint import source_content
    from conversion_lib.sources.safetensors import SafetensorsSource

    try:
        return json.dumps(source_content(SafetensorsSource(directory)))
    except BadInput:
        return None
