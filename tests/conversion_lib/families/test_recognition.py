"""Which family a config is taken for, and what is refused from the config alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, LATER, family_of
from conversion_lib.mapping.to_maxtext import plan_to_maxtext
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.record import Target
from tests.support.published_configs import PUBLISHED


def config_of(name: str, **changes) -> ModelConfig:
    raw = {**PUBLISHED[name][0]}
    if "text_config" in raw:
        raw["text_config"] = {**raw["text_config"], **changes}
    else:
        raw |= changes
    return ModelConfig(raw, Path("config.json"))


def plan_of(config: ModelConfig, **target) -> None:
    """A plan of a checkpoint without tensors: only what the config says can be complained of."""
    family = family_of(config)
    plan_to_maxtext({}, config, family, Target(**target), identity={}, model_name="m", chunk_limit=64 << 20)


@pytest.mark.parametrize("name", LATER)
def test_what_is_left_for_later_is_refused_by_name(name):
    with pytest.raises(BadInput, match=f"{name} cannot be converted yet"):
        family_of(ModelConfig({"architectures": [name]}, Path("config.json")))


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_family_alone_fits(name):
    config = config_of(name)
    fitting = [
        family
        for family in FAMILIES.values()
        if set(family.architectures) & set(config.architectures) and family.fits(config)
    ]
    assert fitting == [family_of(config)]


@pytest.mark.parametrize(
    ("name", "kinds", "at"),
    [
        ("gpt-oss-20b", ["full_attention", "sliding_attention"] * 12, 0),
        ("gemma2-2b", ["sliding_attention", "full_attention"] * 12 + ["full_attention"] * 2, 24),
        ("gemma3-4b", ["sliding_attention"] * 34, 5),
        ("olmo3-7b", (["sliding_attention"] * 3 + ["full_attention"]) * 7 + ["sliding_attention"] * 4, 31),
    ],
)
def test_layers_of_other_kinds_than_maxtexts_are_refused(name, kinds, at):
    with pytest.raises(BadInput, match=rf"layer_types\[{at}\] is {kinds[at]}, but MaxText's model has"):
        plan_of(config_of(name, layer_types=kinds))


def test_an_older_gemma_3_says_its_cycle_in_another_key():
    with pytest.raises(BadInput, match="sliding_window_pattern = 4, but MaxText's model has cycles of 6"):
        plan_of(config_of("gemma3-4b", sliding_window_pattern=4))


@pytest.mark.parametrize("changes", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}])
def test_a_qwen_3_moe_with_dense_layers_is_refused(changes):
    with pytest.raises(BadInput, match="leave layers without experts"):
        plan_of(config_of("qwen3-30b-a3b", **changes))


@pytest.mark.parametrize(("name", "layers"), [("gpt-oss-20b", 5), ("olmo3-7b", 7)])
def test_layers_that_no_scan_has_a_place_for_are_refused(name, layers):
    config = config_of(name, num_hidden_layers=layers, layer_types=None)
    with pytest.raises(BadInput, match=f"num_hidden_layers = {layers}.* from 4 on; --no-scan-layers takes them"):
        plan_of(config)
    with pytest.raises(BadInput, match="is missing"):  # its tensors: the layers have a place
        plan_of(config, scan_layers=False)


def test_an_odd_layer_of_gemma_2_has_no_place_at_all():
    config = config_of("gemma2-2b", num_hidden_layers=5)
    for scan_layers in (True, False):
        with pytest.raises(BadInput, match=r"has no place for layers from 4 on$"):
            plan_of(config, scan_layers=scan_layers)


@pytest.mark.parametrize("key", ["num_local_experts", "num_hidden_layers", "hidden_size"])
@pytest.mark.parametrize("value", [0, -1, "8", None])
def test_a_size_that_is_none_is_refused_by_name(key, value):
    with pytest.raises(BadInput, match=key):
        plan_of(config_of("mixtral-8x7b", **{key: value}))
