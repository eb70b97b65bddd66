"""config.json: either spelling, nested or not, and clear words for a bad one."""

from __future__ import annotations

import json

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import ModelConfig, load_config


def test_a_nested_text_config_comes_first(tmp_path):
    config = ModelConfig({"hidden_size": 1, "text_config": {"hidden_size": 2}}, tmp_path)
    assert config.count("hidden_size") == 2


def test_a_missing_size_is_named(tmp_path):
    with pytest.raises(BadInput, match="has no num_experts or num_local_experts"):
        ModelConfig({}, tmp_path).count("num_experts", "num_local_experts")


@pytest.mark.parametrize("value", [-1, 0, 1.5, "8", True, [8]])
def test_a_size_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(BadInput, match="hidden_size should be an integer of at least 1"):
        ModelConfig({"hidden_size": value}, tmp_path).count("hidden_size")


def test_null_stands_for_absent(tmp_path):
    assert ModelConfig({"q_lora_rank": None}, tmp_path).count("q_lora_rank", default=0) == 0


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "JSON object"), ("\xff", "not JSON")])
def test_a_file_that_is_no_config(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=said):
        load_config(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(BadInput, match=r"has no config\.json"):
        load_config(tmp_path)


def test_a_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A"], "quantization_config": {"x": 1}}))
    config = load_config(tmp_path)
    assert config.architectures == ("A",)
    assert config.quantization == {"x": 1}
