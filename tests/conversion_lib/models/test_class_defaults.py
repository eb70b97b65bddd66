"""The defaults of transformers' classes, against the classes."""

from __future__ import annotations

import pytest

from conversion_lib.logits.forward.architectures import READERS, parse_config
from conversion_lib.models.class_defaults import class_defaults, known_as
from tests.support.config_values import as_the_class_has_it, outcomes

NO_DEFAULT = {"deepseek_v2": {"num_experts_per_tok": 6}}
"""What even the class needs."""

OF_ROPE = {"rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rope_parameters"}
"""Held by what is made of them."""

DERIVED = {"layer_types", "mlp_layer_types", "sliding_window_pattern", "full_attention_interval"}
"""What the class makes of others, or takes without keeping it."""

OTHERWISE_KEPT = {"gemma4": {"global_head_dim", "num_global_key_value_heads"}}
"""Keys that a class reads and does not list."""


def the_class(kind):
    import transformers

    settings = transformers.CONFIG_MAPPING[kind]().get_text_config()
    settings.allow_global_per_layer_attribute_access = True  # Gemma 4's layers differ in some
    return settings


@pytest.mark.parametrize("kind", sorted(class_defaults()))
def test_an_empty_config_is_what_the_class_makes_of_it(kind):
    empty = {"model_type": kind, "architectures": None, **NO_DEFAULT.get(kind, {})}
    ours, theirs = outcomes(empty), outcomes(as_the_class_has_it(empty))
    assert ours == theirs
    assert not isinstance(ours["check"], str), ours["check"]


@pytest.mark.parametrize("kind", sorted(class_defaults()))
def test_every_default_is_the_class_s(kind):
    known, settings = class_defaults()[kind], the_class(kind)
    made = {"num_key_value_heads", "head_dim"}  # of others, where there is no default
    for key, default in known.defaults.items():
        if key in OF_ROPE | DERIVED | OTHERWISE_KEPT.get(kind, set()) or (default is None and key in made):
            continue
        if kind in ("qwen2", "qwen3", "qwen3_moe") and key == "sliding_window":
            continue  # the class drops it where use_sliding_window is off, as it is by default
        found = getattr(settings, key)
        assert (found or None) == (default or None), key
        assert type(found) is type(default) or default is None, key


@pytest.mark.parametrize("kind", sorted(class_defaults()))
def test_null_is_none_where_the_class_takes_it(kind):
    """And other names of a key are the class's."""
    from transformers import CONFIG_MAPPING

    known = class_defaults()[kind]
    for key in known.null_is_none:
        assert key in known.defaults
        assert as_the_class_has_it({"model_type": kind, "text_config": None, key: None}) is not None
    for name, others in known.other_names.items():
        for other in others:
            settings = CONFIG_MAPPING[kind](**{other: 24})
            text = settings.get_text_config()
            assert getattr(text, name) == 24 or kind in TAKEN_IN_OLDER_FILES


TAKEN_IN_OLDER_FILES = {"qwen3_next", "qwen3_5_moe"}
"""Whose experts older files count under the name that other classes have."""


def test_every_reader_has_its_class():
    assert {known_as(kind) for kind in READERS} == set(class_defaults())
    assert parse_config({"model_type": "kimi_k2"}) == parse_config({"model_type": "deepseek_v3"})
