"""A config.json with one value changed, and what plan and check make of it: for the tests that walk all keys."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.mapping.to_maxtext import leaves, placing, require_a_place_for_every_layer
from conversion_lib.models.hf_config import ModelConfig

ABSENT = object()
ODD_VALUES = (ABSENT, None, "text", [], {}, -1, 0, 1.5, True, math.nan, math.inf, 10**400, ["text"], [None], {"a": 1})

TOWERS = ("vision_config", "audio_config")
"""What nobody reads."""

KeyPath = tuple[str, ...]


def key_paths(raw: dict[str, Any], before: KeyPath = ()) -> Iterator[KeyPath]:
    """Where the values of a config.json are, those within objects too."""
    for key, value in raw.items():
        if key in TOWERS:
            continue
        yield (*before, key)
        if isinstance(value, dict):
            yield from key_paths(value, (*before, key))


def changed_at(raw: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    """A copy with another value there, or with none."""
    result = copy.deepcopy(raw)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    if value is ABSENT:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return result


def as_the_class_has_it(raw: dict[str, Any]) -> dict[str, Any] | None:
    """A config.json with all that transformers' class adds to it; None where the class refuses it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    known = {key: value for key, value in copy.deepcopy(raw).items() if key != "model_type"}
    try:
        settings = CONFIG_MAPPING[raw["model_type"]].from_dict(known)
        full: dict[str, Any] = json.loads(settings.to_json_string(use_diff=False))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        return None
    return full | {"architectures": raw.get("architectures")}


def outcomes(raw: dict[str, Any]) -> dict[str, Any]:
    """What plan and check read of it: a text where it is refused."""
    return {"plan": _outcome(planned, raw), "check": _outcome(parse_config, raw)}


def _outcome(read: Callable[[dict[str, Any]], Any], raw: dict[str, Any]) -> Any:
    try:
        return read(raw)
    except BadInput as error:
        return str(error)


def planned(raw: dict[str, Any]) -> Any:
    """What a plan takes from the config: the family and its sizes. Every leaf can be made of them."""
    config = ModelConfig(raw, "config.json")
    family = family_of(config)
    sizes = family.sizes(config)
    for scan_layers in (True, False) if family.scanned else (False,):
        require_a_place_for_every_layer(family, sizes, scan_layers, config)
    if sizes["layers"] < 20:
        _every_leaf(family.name, tuple(sizes.items()))
    return family.name, sizes


@cache
def _every_leaf(name: str, sizes: tuple[tuple[str, int], ...]) -> None:
    family = FAMILIES[name]
    known = dict(sizes) | {dim: flag.published for dim, flag in family.detected.items()}
    for scan_layers in (True, False):
        for leaf in leaves(family, known, scan_layers):
            placing(leaf, known, "0.2.5")
