"""What a MaxText run passes for a config.json, and what is told of what it computes otherwise."""

from __future__ import annotations

import re
from typing import Any

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures import READERS, parse_config
from conversion_lib.maxtext.entries import Chooses, Takes
from conversion_lib.maxtext.model import MaxTextModel, arguments, maxtext_model, warnings
from conversion_lib.maxtext.names import file_value, is_model_name, model_files, setting_names
from conversion_lib.maxtext.table import FULL, MODELS, SLIDING
from conversion_lib.models.catalog import MODELS as CATALOGUE
from conversion_lib.models.class_defaults import known_as
from conversion_lib.models.hf_config import ModelConfig

SIZES = {
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
LLAMA_32 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def of(raw: dict[str, Any], preferred: str = "") -> MaxTextModel:
    model = maxtext_model(ModelConfig(raw, "config.json"), preferred)
    assert model is not None
    return model


def test_llama_3_2_has_another_factor_than_maxtext():
    model = of(LLAMA_32, "llama3.2-1b")
    assert model.reason == "MaxText's model has RoPE factor 8, the original 32"
    assert model.config["rope_parameters"]["factor"] == 8.0
    assert model.run_settings == {
        "model_name": "llama3.1-8b",
        "override_model_config": True,
        "base_emb_dim": 2048,
        "base_num_decoder_layers": 16,
        "base_mlp_dim": 8192,
        "logits_via_embedding": True,
        "normalize_embedding_logits": False,
        "head_dim": 64,
        "rope_type": "llama3.1",
    }
    assert warnings(model) == [f"{model.reason}; `ferry check` measures what that changes"]


def test_llama_3_1_is_maxtexts_own():
    scaling = LLAMA_32["rope_scaling"] | {"factor": 8.0}
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    model = of(LLAMA_32 | sizes | {"rope_scaling": scaling, "tie_word_embeddings": False})
    assert (model.differs, model.run_settings) == (False, {"model_name": "llama3.1-8b", "rope_type": "llama3.1"})
    assert warnings(model) == []


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        # the other spelling of RoPE
        ({"rope_scaling": None, "rope_parameters": LLAMA_32["rope_scaling"] | {"rope_theta": 5e5}}, "RoPE factor 8"),
        ({"rope_scaling": LLAMA_32["rope_scaling"] | {"factor": 8}}, ""),
        ({"rope_scaling": LLAMA_32["rope_scaling"] | {"factor": 8, "low_freq_factor": 2}}, "low_freq_factor 1, .* 2"),
        ({"rope_scaling": None}, ""),
        ({"rope_scaling": YARN}, "RoPE scaling default, the original yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling default, the original linear"),
        ({"attention_bias": True}, "RoPE factor 8, .*|attention_bias false, the original true"),
    ],
)
def test_what_llamas_model_lacks(changes: dict[str, Any], differs: str):
    model = of(LLAMA_32 | changes)
    assert model.differs is bool(differs)
    assert re.search(differs, model.reason)


@pytest.mark.parametrize(
    ("kind", "changes", "settings", "differs"),
    [
        ("qwen2", {"rope_scaling": YARN}, {"rope_type": "yarn", "rope_factor": 4, "rope_attention_scaling": True}, ""),
        ("qwen2", {"rope_scaling": YARN | {"attention_factor": 1.0}}, {"rope_attention_scaling": False}, ""),
        ("qwen2", {"rope_scaling": YARN | {"attention_factor": 1.5}}, {}, "attention_factor 1.13863, the original 1.5"),
        ("qwen2", {"rope_scaling": YARN | {"factor": 2.5}}, {"rope_factor": 2}, "RoPE factor 2, the original 2.5"),
        ("qwen2", {"rope_theta": 10000.5}, {"rope_max_timescale": 10000}, "rope_theta 10000, the original 10000.5"),
        ("qwen3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_linear_scaling_factor": 2}, ""),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, {}, "use_sliding_window false"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 4}, {}, ""),
        ("qwen3", {"tie_word_embeddings": True}, {"normalize_embedding_logits": False}, ""),
        ("qwen3_moe", {"norm_topk_prob": False}, {}, "norm_topk_prob true, the original false"),
        (
            "qwen3_moe",
            {"norm_topk_prob": True, "moe_intermediate_size": 48},
            {"base_mlp_dim": 48, "base_moe_mlp_dim": 48},
            "",
        ),
        ("mixtral", {"sliding_window": 4096}, {}, "sliding_window none, the original 4096"),
        ("mixtral", {}, {"rope_max_timescale": 1000000, "base_moe_mlp_dim": 160}, ""),
        ("gpt_oss", {}, {"rope_type": "yarn", "rope_factor": 32, "max_position_embeddings": 131072}, ""),
        ("gpt_oss", {"swiglu_limit": 5.0}, {"mlp_activations_limit": 5}, ""),
        ("gemma2", {"attn_logit_softcapping": None}, {"attn_logits_soft_cap": 0.0}, ""),
        ("gemma2", {"vocab_size": 256000}, {"vocab_size": 256128, "base_num_decoder_layers": 2}, ""),
        ("gemma2", {"rms_norm_eps": 1e-5}, {}, "rms_norm_eps 1e-06, the original 1e-05"),
        ("gemma3", {"query_pre_attn_scalar": 16, "head_dim": 32}, {}, ""),
        ("gemma3", {"query_pre_attn_scalar": 99}, {}, "query_pre_attn_scalar 16|256, the original 99"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "num_experts_per_tok": 2}, {}, "topk_method greedy"),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, {"n_routing_groups": -1, "topk_routing_group": -1}, ""),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, {}, "latent_norm_eps 1e-05, the original 1e-06"),
        ("deepseek_v3", {"first_k_dense_replace": 0}, {"base_mlp_dim": 2048}, ""),
        ("deepseek_v3", {"rope_scaling": YARN}, {"mscale": 0.0, "rope_attention_scaling": True}, ""),
        (
            "deepseek_v3",
            {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            {"mscale": 1, "rope_attention_scaling": False, "max_position_embeddings": 8192},
            "",
        ),
    ],
)
def test_settings_and_differences(kind: str, changes: dict[str, Any], settings: dict[str, Any], differs: str):
    model = of({"model_type": kind, **SIZES, **changes})
    assert settings.items() <= model.settings.items()
    if not differs:
        assert model.reason == ""
        return
    assert differs in model.reason or any(part in model.reason for part in differs.split("|"))
    # and a config.json that says so is one that MaxText computes
    assert of(model.config).reason in ("", "MaxText's model has latent_norm_eps 1e-05, the original 1e-06")
    parse_config(model.config)


def test_the_nearest_of_maxtexts_files_is_taken():
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    raw = {"model_type": "qwen3", **SIZES, **sizes, "num_key_value_heads": 8, "vocab_size": 151936}
    raw |= {"tie_word_embeddings": True, "rope_theta": 5e6}
    assert of(raw).run_settings == {"model_name": "qwen3-4b-thinking-2507"}
    assert of(raw | {"rope_theta": 1e6}, "someone/fork").run_settings == {"model_name": "qwen3-4b"}
    assert of(raw | {"rope_theta": 2e6}).run_settings == {
        "model_name": "qwen3-4b",
        "override_model_config": True,
        "rope_max_timescale": 2000000,
    }


def test_the_scalar_of_gemma_3_says_which_name():
    raw = {"model_type": "gemma3", **SIZES, "head_dim": 32, "query_pre_attn_scalar": 16}
    assert of(raw).name == "gemma3-27b"
    assert of(raw | {"query_pre_attn_scalar": 32}).name == "gemma3-4b"


def test_a_text_model_within_another():
    text = {"model_type": "gemma3_text", **SIZES, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    model = of({"model_type": "gemma3", "text_config": text | {"rms_norm_eps": 1e-4}})
    assert model.settings["rope_linear_scaling_factor"] == 8
    assert model.settings["local_rope_max_timescale"] == 10000
    assert "text_config" not in model.config
    assert set(model.config["rope_parameters"]) == {SLIDING, FULL}


def test_only_what_differs_is_told_to_override():
    assert arguments({"a": True, "b": 1e-06, "c": [11, 11, 10], "d": ["gelu", "linear"]}) == [
        "a=true",
        "b=1.0e-06",
        "c=[11,11,10]",
        "d=[gelu,linear]",
    ]


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, True])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "routed_scaling_factor", "vocab_size"])
def test_a_value_of_another_type_is_refused(key: str, value: Any):
    with pytest.raises(BadInput, match=f"^config.json: {key} should be"):
        of({"model_type": "deepseek_v3", **SIZES, key: value})


@pytest.mark.parametrize("factor", ["8", None, -1, [8]])
def test_a_wrong_rope_factor_is_refused_or_left_out(factor: Any):
    raw = LLAMA_32 | {"rope_scaling": LLAMA_32["rope_scaling"] | {"factor": factor}}
    if factor is None:
        of(raw)
        return
    with pytest.raises(BadInput, match=r"rope_scaling\.factor"):
        of(raw)


def test_nothing_is_known_of_other_architectures():
    assert maxtext_model(ModelConfig({"model_type": "bert"}, "config.json")) is None
    assert "nothing is known" in warnings(None)[0]


def test_the_table_has_every_model_that_the_check_has_and_names_that_maxtext_has():
    """And settings: those of MaxText alone."""
    kinds = {known_as(kind) for kind in READERS} | {"gemma4_dense", "gemma4_e2b", "gemma4_e4b"}
    assert set(MODELS) == kinds
    assert {name for model in MODELS.values() for name in model.names} == set(model_files())
    assert all(is_model_name(name) for name in model_files())
    for model in MODELS.values():
        entries = [*model.keys.values()]
        scalings = [scaling for by_kind in model.rope.values() for scaling in by_kind.values()]
        entries += [entry for scaling in scalings for entry in scaling.keys.values()]
        named = {entry.setting for entry in entries if isinstance(entry, Takes | Chooses)}
        named |= {name for scaling in scalings for name in scaling.settings}
        assert named - {"model_name"} <= set(setting_names())
        assert all(file_value(model.names[0], name) is not None for name in named - {"model_name"})


def test_maxtexts_names_in_the_catalogue_are_in_the_table():
    """A model that MaxText knows by the catalogue's name is run by it."""
    mine = {model.name for model in CATALOGUE if is_model_name(model.name)}
    foreign = {"llama3.2-1b", "llama3.2-3b", "deepseek3.1-671b", "kimi-k2-thinking-1t"}
    assert mine - set(model_files()) <= foreign
