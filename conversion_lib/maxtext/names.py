"""MaxText 0.2.5's names: of its settings, and of its models with the sizes they stand for.

Some models go by several names, and some have no conversion here.
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
"""Where a field of Target goes by another name among MaxText's settings; its converter alone has `save_dtype`."""

SPELLINGS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "num_local_experts": ("num_local_experts", "num_experts"),
}
"""Keys that config files have for the same size."""


@functools.cache
def _facts() -> dict[str, Any]:
    """Lists of names, and by name of the catalogue the sizes as the keys of config.json."""
    facts: dict[str, Any] = json.loads((Path(__file__).parent / "settings_0_2_5.json").read_text())
    return facts


def setting_names() -> list[str]:
    """Every setting that MaxText's command line takes as `name=value`."""
    return list(_facts()["settings"])


def is_model_name(name: str) -> bool:
    """Whether MaxText or the catalogue has a model of that name."""
    return name in _facts()["model_names"] or name in {model.name for model in catalog.MODELS}


def model_of(name: str) -> Model:
    """The model that MaxText calls `name`: the catalogue's name for its sizes, and the repository of its weights.

    Raises BadInput for a name that MaxText has and the catalogue has not, and for one that neither has.
    """
    if name in {model.name for model in catalog.MODELS}:
        return catalog.model_named(name)
    if name in catalog.SIBLINGS:
        same, repo = catalog.SIBLINGS[name]
        return Model(same, catalog.model_named(same).family, repo)
    if is_model_name(name):
        raise BadInput(
            f"model {name}: MaxText knows this name, but ferry has no conversion for it; `ferry models` lists those "
            "it has"
        )
    return catalog.model_named(name)


def size_differences(model: Model, config: ModelConfig) -> list[str]:
    """The sizes in which a source's config.json differs from the named model, as in `vocab_size (101, not 151936)`.

    Keys that the file leaves to transformers' defaults are passed over.
    """
    found = []
    for key, expected in _facts()["sizes"].get(model.name, {}).items():
        spelling = next((name for name in SPELLINGS.get(key, (key,)) if config.get(name) is not None), None)
        if spelling is not None and config.get(spelling) != expected:
            found.append(f"{spelling} ({config.get(spelling)}, not {expected})")
    return found
