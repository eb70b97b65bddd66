"""MaxText 0.2.5's names of settings, and of models with their sizes.

Some models have several names, and Ferry has no conversion for some.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from conversion_lib.errors import BadInput
from conversion_lib.models import catalog
from conversion_lib.models.catalog import Model
from conversion_lib.models.hf_config import ModelConfig

TARGET_SETTINGS = {
    "save_dtype": "dtype",
    "ocdbt": "checkpoint_storage_use_ocdbt",
    "zarr3": "checkpoint_storage_use_zarr3",
    "shards": "simulated_cpu_devices_count",
}
"""MaxText's names of settings for fields of Target. Only MaxText's converter has `save_dtype`."""

SPELLINGS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "num_local_experts": ("num_local_experts", "num_experts"),
}
"""Other keys in config files for the same size."""


@functools.cache
def _facts() -> dict[str, Any]:
    """Returns the lists of names, and each catalogue model's sizes by the keys of config.json."""
    facts: dict[str, Any] = json.loads((Path(__file__).parent / "settings_0_2_5.json").read_text())
    return facts


def model_files() -> dict[str, dict[str, Any]]:
    """What MaxText 0.2.5's files `configs/models/NAME.yml` say, by name, of those that `table.py` has."""
    files: dict[str, dict[str, Any]] = _facts()["model_files"]
    return files


def file_value(name: str, setting: str) -> Any:
    """What a setting is where a run passes `model_name` alone: the model's file's, or that of `base.yml`."""
    return model_files()[name].get(setting, _facts()["base_file"].get(setting))


def setting_names() -> list[str]:
    """Returns every setting that MaxText's command line accepts as `name=value`."""
    return list(_facts()["settings"])


def is_model_name(name: str) -> bool:
    """Returns whether MaxText or the catalogue has a model with this name."""
    return name in _facts()["model_names"] or name in {model.name for model in catalog.MODELS}


def model_of(name: str) -> Model:
    """Returns the model that MaxText calls `name`.

    Returns:
        The catalogue's name and family for its sizes, and the repository of its weights.

    Raises:
        BadInput: The catalogue does not have the model.
    """
    if name in {model.name for model in catalog.MODELS}:
        return catalog.model_named(name)
    if name in catalog.SIBLINGS:
        same, repo = catalog.SIBLINGS[name]
        return Model(same, catalog.model_named(same).family, repo)
    if is_model_name(name):
        raise BadInput(
            f"model {name}: MaxText knows this name, but ferry has no conversion for it; `ferry models` lists its "
            "models"
        )
    return catalog.model_named(name)


def size_differences(model: Model, config: ModelConfig) -> list[str]:
    """Returns the sizes in which a config.json differs from a model, such as `vocab_size (101, not 151936)`.

    Keys that are not in the file are skipped.
    """
    found = []
    for key, expected in _facts()["sizes"].get(model.name, {}).items():
        spelling = next((name for name in SPELLINGS.get(key, (key,)) if config.given(name) is not None), None)
        if spelling is not None and config.given(spelling) != expected:
            found.append(f"{spelling} ({config.given(spelling)}, not {expected})")
    return found


def size_notes(model: Model | None, config: ModelConfig) -> tuple[str, ...]:
    """A line for a person where a model was named and the source has other sizes than it."""
    if model is None or not (other := size_differences(model, config)):
        return ()
    return (f"warning: {config.path} differs from MaxText's {model.name} in {', '.join(other)}; the file is used",)
