"""What MaxText's model computes of a config.json: its settings, and where its function is another one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conversion_lib.families import FAMILIES
from conversion_lib.maxtext.entries import (
    Chooses,
    Cycle,
    Entries,
    Fixed,
    Follows,
    Lacks,
    Model,
    Scaling,
    Takes,
)
from conversion_lib.maxtext.names import file_value, model_files
from conversion_lib.maxtext.rope import ropes_of
from conversion_lib.maxtext.table import EVERY_LAYER, FULL, MODELS, SLIDING
from conversion_lib.models.class_defaults import known_as
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.job import Job

Settings = dict[str, Any]

WORDS = {"rope_type": "RoPE scaling", "factor": "RoPE factor"}
"""How a person calls some keys of `rope_parameters`."""

CLOSE = 1e-6
"""The relative difference of two numbers that are the same: files have some of them rounded."""


@dataclass(frozen=True)
class Difference:
    """Where MaxText's function is not the original's: a key of config.json, and what stands under it for each.

    Attributes:
        layers: The kind of layers; empty for all.
    """

    key: str
    theirs: Any
    original: Any
    layers: str = EVERY_LAYER

    def __str__(self) -> str:
        if self.key == "layer_types":
            return f"layers in cycles of {', '.join(dict.fromkeys(self.theirs))}, the original in another order"
        where = f" in its layers of {self.layers}" if self.layers else ""
        return f"{WORDS.get(self.key, self.key)} {_said(self.theirs)}{where}, the original {_said(self.original)}"


@dataclass(frozen=True)
class MaxTextModel:
    """MaxText's model for a config.json.

    Attributes:
        name: MaxText's `model_name`, whose file of settings is the nearest.
        settings: Every setting that makes it compute what config.json says, as far as it can.
        to_pass: Those that the file of that name has otherwise.
        differences: What it computes otherwise all the same.
        config: A config.json that says what it computes; the original's own where that is the same.
    """

    name: str
    settings: Settings
    to_pass: Settings
    differences: tuple[Difference, ...]
    config: dict[str, Any]

    @property
    def differs(self) -> bool:
        """Whether MaxText computes something else than the original, whatever is passed."""
        return bool(self.differences)

    @property
    def overrides(self) -> bool:
        """Whether MaxText has to be told that its file of that name does not hold."""
        return bool(self.to_pass.keys() & model_files()[self.name].keys())

    @property
    def run_settings(self) -> Settings:
        """What a run passes: the name, and what that does not say."""
        override = {"override_model_config": True} if self.overrides else {}
        return {"model_name": self.name, **override, **self.to_pass}

    @property
    def reason(self) -> str:
        """How its function differs, in words; empty where it does not."""
        return f"MaxText's model has {'; '.join(map(str, self.differences))}" if self.differences else ""


def maxtext_model(config: ModelConfig, preferred: str = "", model_type: str = "") -> MaxTextModel | None:
    """MaxText's model for a config.json; None for an architecture that is not in the table.

    Args:
        config: The file.
        preferred: The model's name in the catalogue: of several that fit as well, it is taken.
        model_type: That of transformers' class; empty where the file names it.

    Raises:
        BadInput: A value is of another type than it must be.
    """
    model_type = known_as(model_type or config.model_type)
    config = config.of_class(model_type)
    kind = _kind_of(config, model_type)
    if kind not in MODELS:
        return None
    model, found = MODELS[kind], _Found()
    values = _values(config, model)
    found.add(model.keys, values)
    names = found.settings.pop("model_name", model.names)
    ropes = ropes_of(config, model.rope)
    positions = config.count("max_position_embeddings")
    theirs = {layers: _rope(found, model.rope[layers], rope, layers, positions) for layers, rope in ropes.items()}
    settings = _completed(found.settings, model, config)
    name = min(names, key=lambda one: (len(_to_pass(one, settings)), one != preferred))
    changed = {one.key: one.theirs for one in found.differences if one.key in model.keys}
    return MaxTextModel(
        name=name,
        settings=settings,
        to_pass=_to_pass(name, settings),
        differences=tuple(found.differences),
        config=_as_config(config, model_type, changed, theirs) if found.differences else config.raw,
    )


def _kind_of(config: ModelConfig, model_type: str) -> str:
    """The table's name for an architecture: its `model_type`; MaxText has four models of Gemma 4's."""
    if model_type != "gemma4":
        return model_type
    if not config.count("hidden_size_per_layer_input", least=0):
        return "gemma4" if config.flag("enable_moe_block") else "gemma4_dense"
    kinds = config.texts("layer_types") or ()
    cycle = kinds.index(FULL) + 1 if FULL in kinds else 0
    return {5: "gemma4_e2b", 6: "gemma4_e4b"}.get(cycle, f"gemma4 in cycles of {cycle}")


def _to_pass(name: str, settings: Settings) -> Settings:
    return {setting: value for setting, value in settings.items() if file_value(name, setting) != value}


@dataclass
class _Found:
    """Settings and differences, as the table's entries are gone through."""

    settings: Settings = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    def add(self, entries: Entries, values: Mapping[str, Any], layers: str = EVERY_LAYER) -> dict[str, Any]:
        """Takes in some entries; returns what MaxText has otherwise, by key."""
        theirs: dict[str, Any] = {}
        for key, entry in entries.items():
            original = values.get(key)
            match entry:
                case Takes(setting, words, whole):
                    value = words.get(original, original) if not isinstance(original, list) else original
                    if whole and isinstance(value, float) and not value.is_integer():
                        value = theirs[key] = max(1, round(value))
                    if value is not None:
                        self.settings[setting] = _plain(value)
                case Fixed(value) | Lacks(value) if not _same(value, original):
                    theirs[key] = value
                case Chooses(setting, choices):
                    self._choose(key, setting, choices({**values, **theirs}), original, theirs)
                case Follows(followed, number) if not _same(values.get(followed), number):
                    theirs[key], original = values.get(followed), number
                case Cycle(kinds):
                    cycle = [kinds[n % len(kinds)] for n in range(len(original or ()))]
                    if original and list(original) != cycle:
                        theirs[key] = cycle
            if key in theirs:
                self.differences.append(Difference(key, theirs[key], original, layers))
        return theirs

    def _choose(
        self, key: str, setting: str, choices: Mapping[Any, Any], original: Any, theirs: dict[str, Any]
    ) -> None:
        fitting = [choice for choice, value in choices.items() if _same(value, original)]
        if not fitting:
            fitting = [_nearest(choices, original)]
            theirs[key] = choices[fitting[0]]
        # of names the nearest file's is taken later
        self.settings[setting] = fitting if setting == "model_name" else _plain(fitting[0])


def _nearest(choices: Mapping[Any, Any], original: Any) -> Any:
    if not isinstance(original, int | float):
        return next(iter(choices))
    return min(choices, key=lambda choice: abs(choices[choice] - original))


def _rope(
    found: _Found, scalings: Mapping[str, Scaling], rope: dict[str, Any], layers: str, positions: int
) -> dict[str, Any]:
    """Takes in the RoPE of a kind of layers; returns the one that MaxText computes."""
    kind = rope["rope_type"]
    if kind not in scalings:
        found.differences.append(Difference("rope_type", "default", kind, layers))
        kept = ("rope_theta", "partial_rotary_factor", "rope_interleave", "mrope_section")
        rope = {"rope_type": "default"} | {key: rope[key] for key in kept if key in rope}
        kind = "default"
    found.settings |= scalings[kind].settings
    if found.settings.get("rope_type") == "yarn":
        stretched = math.ceil(rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", positions))
        found.settings["max_position_embeddings"] = max(positions, stretched)
    return rope | found.add(scalings[kind].keys, rope, layers)


def _values(config: ModelConfig, model: Model) -> dict[str, Any]:
    """What config.json says under each key of the table."""
    values = {key: _read(config, key) for key in model.keys}
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    values |= {"hidden_size": hidden, "num_attention_heads": heads}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if "head_dim" in values and values["head_dim"] is None:
        values["head_dim"] = hidden // heads
    if values.get("use_sliding_window") and config.default("max_window_layers") is not None:
        kinds, first = config.texts("layer_types"), config.count("max_window_layers", least=0)
        values["use_sliding_window"] = SLIDING in kinds if kinds else first < config.count("num_hidden_layers")
    if values.get("hidden_act") == "swish":
        values["hidden_act"] = "silu"
    if model.expert_width is not None:
        values["intermediate_size"] = values["moe_intermediate_size"] = config.get(model.expert_width)
    if kinds := config.texts("mlp_layer_types", "num_hidden_layers"):  # V3.2's files may say it layer by layer
        values["first_k_dense_replace"] = kinds.count("dense")
    if values.get("first_k_dense_replace") == 0:  # MaxText insists, though no layer then has this size
        values["intermediate_size"] = values["moe_intermediate_size"]
    if "global_head_dim" in values:
        values |= _global_sizes(config, values)
    return values


def _read(config: ModelConfig, key: str) -> Any:
    """The value under `key`; None where there is none. Raises BadInput where it is of another type than the class's."""
    value, default = config.get(key), config.default(key)
    if value is None:
        return None
    if isinstance(default, bool):
        return config.flag(key)
    if isinstance(default, int | float):
        return value if isinstance(default, int) and config.number(key) == value else config.number(key)
    return config.text(key) if isinstance(default, str) else value


def _global_sizes(config: ModelConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 4's sizes of full attention: under keys with `global` as published, by layer as transformers writes them.

    MaxText takes the other layers' key-value heads where it is told none.
    """
    by_layer = config.get("per_layer_config")
    own = next(iter(by_layer.values())) if isinstance(by_layer, dict) and by_layer else {}
    kv_heads = config.get("num_global_key_value_heads") if values["attention_k_eq_v"] else None
    kv_heads = own.get("num_key_value_heads", kv_heads)
    same = kv_heads is None or kv_heads == values["num_key_value_heads"]
    return {
        "global_head_dim": own.get("head_dim", values["global_head_dim"]),
        "num_global_key_value_heads": 0 if same else kv_heads,
    }


def _completed(settings: Settings, model: Model, config: ModelConfig) -> Settings:
    """Settings that more than one key makes."""
    completed = dict(settings)
    if "base_num_decoder_layers" in completed:
        completed["base_num_decoder_layers"] //= model.layers_in_one
    if completed.get("logits_via_embedding") and not model.divides_logits:
        completed["normalize_embedding_logits"] = False
    if completed.get("n_routing_groups") == -1:
        completed["topk_routing_group"] = -1
    local = completed.get("local_rope_max_timescale")
    if local is not None and local == completed.get("rope_max_timescale"):
        del completed["local_rope_max_timescale"]  # that of all layers holds
    return completed


def _as_config(
    config: ModelConfig, model_type: str, changed: Mapping[str, Any], ropes: Mapping[str, Any]
) -> dict[str, Any]:
    """A config.json that says what MaxText computes."""
    nested = config.raw.get("text_config")
    flat = {**config.raw, **nested} if isinstance(nested, dict) else dict(config.raw)
    for key in ("text_config", "rope_scaling", "rope_local_base_freq"):
        flat.pop(key, None)
    rope = ropes[EVERY_LAYER] if EVERY_LAYER in ropes else dict(ropes)
    return {**flat, "model_type": model_type, **changed, "rope_parameters": rope}


def _same(a: Any, b: Any) -> bool:
    """Whether two values of a key say the same: null, false and zero all say that it is not there."""
    if a == b or (not a and not b):
        return True
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return numbers and math.isclose(a, b, rel_tol=CLOSE)


def _plain(value: Any) -> Any:
    """As MaxText's types want it: whole numbers without a point, lists."""
    if isinstance(value, tuple):
        return list(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _said(value: Any) -> str:
    """A value in a sentence."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def model_of_job(job: Job) -> MaxTextModel | None:
    """MaxText's model for what a conversion writes; None where nothing is known of it."""
    return maxtext_model(job.config, job.plan.model_name, FAMILIES[job.plan.family].model_type)


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as MaxText's command line takes them: `key=value`."""
    return [f"{key}={yaml_value(value)}" for key, value in settings.items()]


def yaml_value(value: Any) -> str:
    """A value in YAML, without spaces."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(yaml_value, value))}]"
    text = str(value)
    # to many readers 1e-06 is a text
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def warnings(model: MaxTextModel | None) -> list[str]:
    """What a person is told before a conversion: what MaxText's model does not compute."""
    if model is None:
        return ["nothing is known of MaxText's model of this architecture: its settings are for you to find"]
    return [f"{model.reason}; `ferry check` measures what that changes"] if model.differences else []
