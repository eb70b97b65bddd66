"""config.json: each value in its type and in any spelling, and clear words for a bad one."""

from __future__ import annotations

import json

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.models.hf_config import ModelConfig, Values, load_config


def config(**raw) -> ModelConfig:
    return ModelConfig(raw, "config.json")


def test_a_nested_text_config_comes_first():
    assert config(hidden_size=1, text_config={"hidden_size": 2}).count("hidden_size") == 2


@pytest.mark.parametrize("value", ["text", [], 7, True])
def test_a_nested_config_that_is_none_is_refused(value):
    with pytest.raises(BadInput, match=r"config\.json: text_config should be an object, not "):
        config(text_config=value)


def test_a_missing_size_is_named():
    with pytest.raises(BadInput, match=r"config\.json has no num_experts, which this architecture needs"):
        config().count("num_experts")


@pytest.mark.parametrize("value", [-1, 0, 1.5, "8", True, [8], float("nan"), 4096.0])
def test_a_size_that_is_none_is_refused(value):
    with pytest.raises(BadInput, match="hidden_size should be an integer of at least 1"):
        config(hidden_size=value).count("hidden_size")


def test_a_size_beyond_all_bounds_is_refused_in_a_short_line():
    with pytest.raises(BadInput, match="hidden_size should be an integer of at most 2147483647, not 1000") as refused:
        config(hidden_size=10**400).count("hidden_size")
    assert len(str(refused.value)) < 200
    with pytest.raises(BadInput, match="num_hidden_layers should be an integer of at most 10000"):
        config(num_hidden_layers=10**9).count("num_hidden_layers")


@pytest.mark.parametrize("value", ["1e-6", None, [1.0], True, float("inf"), float("-inf"), float("nan"), 10**400, -1])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(BadInput, match=r"config\.json(: eps should be a number of at least 0| has no eps)"):
        Values({"eps": value}, "config.json").number("eps", least=0)


@pytest.mark.parametrize("value", ["false", "true", 0, 1, [], {}])
def test_a_flag_is_true_or_false(value):
    """The text "false" would be true to Python."""
    with pytest.raises(BadInput, match="tie_word_embeddings should be true or false, not "):
        config(tie_word_embeddings=value).flag("tie_word_embeddings")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("full_attention", "should be a list of texts"),
        (["full_attention", None], "should be a list of texts"),
        ([["full_attention"]], "should be a list of texts"),
        (["full_attention"], "has 1 entries, expected 2: one for each of num_hidden_layers"),
    ],
)
def test_a_list_of_texts(value, said):
    with pytest.raises(BadInput, match=f"layer_types {said}"):
        config(num_hidden_layers=2, layer_types=value).texts("layer_types", "num_hidden_layers")


@pytest.mark.parametrize("value", ["text", [1], 7])
def test_an_object_that_is_none_is_refused(value):
    with pytest.raises(BadInput, match="rope_scaling should be an object"):
        config(rope_scaling=value).section("rope_scaling")


def test_a_key_within_an_object_is_named_with_it():
    section = config(rope_scaling={"factor": "8"}).section("rope_scaling")
    with pytest.raises(BadInput, match=r"rope_scaling\.factor should be a number, not '8'"):
        section.number("factor")


def test_null_stands_for_what_the_class_has():
    """But where null means none to it."""
    mixtral = config(model_type="mixtral", rope_theta=None, num_local_experts=None)
    assert (mixtral.number("rope_theta"), mixtral.count("num_local_experts")) == (1e6, 8)
    assert config(model_type="gemma2", attn_logit_softcapping=None).optional_number("attn_logit_softcapping") is None
    assert config(model_type="gemma2").optional_number("attn_logit_softcapping") == 50
    assert config(model_type="deepseek_v3", q_lora_rank=None).optional_count("q_lora_rank") is None
    assert config(model_type="deepseek_v3").optional_count("q_lora_rank") == 1536


@pytest.mark.parametrize(
    ("kind", "key", "name"),
    [
        ("mixtral", "num_local_experts", "num_experts"),
        ("qwen3_moe", "num_experts", "num_local_experts"),
        ("deepseek_v2", "n_routed_experts", "num_experts"),
        ("deepseek_v3", "n_routed_experts", "num_local_experts"),
        ("kimi_k2", "num_nextn_predict_layers", "num_mtp_layers"),
    ],
)
def test_another_name_of_a_key(kind, key, name):
    assert config(model_type=kind, **{name: 3}).count(key) == 3
    assert config(model_type=kind, **{name: 3, key: 3}).count(key) == 3
    assert config(model_type=kind, **{name: 3, key: None}).count(key) == 3
    with pytest.raises(BadInput, match=f"{name} should be an integer"):
        config(model_type=kind, **{name: "3"}).count(key)
    with pytest.raises(BadInput, match=f"{key} is 4 and {name} is 3, and both mean the same"):
        config(model_type=kind, **{name: 3, key: 4}).count(key)


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float32", "dtype": None}, "float32"),
        ({"dtype": "half"}, "float16"),
        ({"text_config": {"torch_dtype": "torch.bfloat16"}}, "bfloat16"),
        ({"text_config": {}, "dtype": "bf16"}, "bfloat16"),
        ({}, None),
    ],
)
def test_the_dtype_in_every_spelling(raw, dtype):
    assert config(**raw).dtype == dtype


@pytest.mark.parametrize("value", [16, ["bfloat16"], {"": "bfloat16"}])
def test_a_dtype_that_is_none_is_refused(value):
    with pytest.raises(BadInput, match="torch_dtype should be a dtype's name, not "):
        assert config(torch_dtype=value).dtype


def test_what_transformers_class_is_given():
    """It takes no null for what it has a default for, and no `torch.` before a dtype."""
    raw = {
        "model_type": "gemma3",
        "torch_dtype": "torch.bfloat16",
        "text_config": {"rms_norm_eps": None, "sliding_window": None, "layer_types": None, "hidden_size": 64},
        "vision_config": {"hidden_size": None},
    }
    assert config(**raw).for_transformers() == {
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "text_config": {"sliding_window": None, "layer_types": None, "hidden_size": 64},
        "vision_config": {"hidden_size": None},
    }


@pytest.mark.parametrize(
    ("raw", "family"),
    [
        ({"architectures": ["FSDPQwen3ForCausalLM"]}, "qwen3"),
        ({"architectures": ["DDPQwen3ForCausalLM"]}, "qwen3"),
        ({"architectures": ["FSDPDDPGemma3ForConditionalGeneration"]}, "gemma3"),
        # another wrapper, where model_type says what is in it
        ({"architectures": ["GaudiLlamaForCausalLM"], "model_type": "llama"}, "llama3.1"),
        ({"architectures": ["PeftModelForCausalLM"], "model_type": "mixtral"}, "mixtral"),
        ({"architectures": ["OptimizedModule"], "model_type": "qwen2"}, "qwen2.5"),
        # no class is named
        ({"architectures": None, "model_type": "qwen3_next"}, "qwen3_next"),
        ({"architectures": [], "model_type": "gemma3_text"}, "gemma3"),
        ({"model_type": "kimi_k2"}, "deepseek_v3"),
        ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}, "gemma4"),
        ({"model_type": "gemma4"}, "gemma4_small"),
        ({"model_type": "qwen3_5_moe_text", "text_config": None}, "qwen3.5"),
    ],
)
def test_which_family_is_named(raw, family):
    assert family_of(config(**raw)) is FAMILIES[family]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"architectures": ["GaudiLlamaForCausalLM"]}, "GaudiLlamaForCausalLM is not known"),
        ({"architectures": ["MyLlamaForCausalLM"], "model_type": "qwen3"}, "MyLlamaForCausalLM is not known"),
        ({"architectures": ["PeftModelForCausalLM"]}, r"none \(model_type missing\) is not known"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures should be a list of names"),
        ({"architectures": [None]}, "architectures should be a list of names"),
        ({"model_type": ["qwen3"]}, "model_type should be a text"),
        ({"architectures": ["FSDPDeepseekV4ForCausalLM"]}, "DeepseekV4ForCausalLM is not supported"),
    ],
)
def test_which_family_is_not_named(raw, said):
    with pytest.raises(BadInput, match=said):
        family_of(config(**raw))


@pytest.mark.parametrize("value", ["fp8", ["fp8"], True, 8])
def test_a_quantization_that_is_none_is_refused(value):
    """It would be converted as if there were none."""
    with pytest.raises(BadInput, match="quantization_config should be an object, not "):
        assert config(quantization_config=value).quantization


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ("\xff", "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"a": ' + "[" * 200_000 + "}", "nested too deeply"),
    ],
    ids=["cut off", "a list", "no text", "a number of 5000 digits", "nested"],
)
def test_a_file_that_is_no_config(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=said) as refused:
        load_config(tmp_path)
    assert "\n" not in str(refused.value)


def test_no_file(tmp_path):
    with pytest.raises(BadInput, match=r"has no config\.json"):
        load_config(tmp_path)


def test_a_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A"], "quantization_config": {"x": 1}}))
    found = load_config(tmp_path)
    assert found.architectures == ("A",)
    assert found.quantization == {"x": 1}
