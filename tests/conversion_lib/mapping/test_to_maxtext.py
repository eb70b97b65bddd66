"""Plans of real models, from names and shapes alone: everything is taken, everything lies where MaxText wants it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.mapping.to_maxtext import plan_to_maxtext
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.plan import ArrayPlan, Plan
from conversion_lib.record import Target
from tests.support import published_tensors
from tests.support.family import Published, published
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors


def tensors_of(config: dict) -> dict[str, TensorInfo]:
    listed = deepseek_tensors if "kv_lora_rank" in config else llama_tensors
    return published_tensors.tensors_of(Published(config, 0, listed))


def plan_of(config: dict, tensors: dict[str, TensorInfo], **target) -> Plan:
    model = ModelConfig(config, Path("config.json"))
    options = {"identity": {}, "model_name": "m", "chunk_limit": 64 << 20}
    return plan_to_maxtext(tensors, model, family_of(model), Target(**target), **options)


def by_path(plan: Plan) -> dict[str, ArrayPlan]:
    return {array.path.removeprefix("params/params/"): array for array in plan.arrays}


def test_deepseek_v3_scanned():
    """Names and shapes as MaxText 0.2.5 has them for deepseek3-671b (61 layers, 3 of them dense)."""
    config = published("deepseek3-671b").config
    arrays = by_path(plan_of(config, tensors_of(config)))
    moe, experts = "decoder/moe_layers", "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0"
    expected = {
        "token_embedder/embedding": (129280, 7168),
        "decoder/decoder_norm/scale": (7168,),
        "decoder/logits_dense/kernel": (7168, 129280),
        "decoder/dense_layers/mlp/wi_0/kernel": (7168, 3, 18432),
        "decoder/dense_layers/mlp/wo/kernel": (18432, 3, 7168),
        f"{moe}/pre_self_attention_layer_norm/scale": (7168, 58),
        f"{moe}/self_attention/wq_a/kernel": (7168, 58, 1536),
        f"{moe}/self_attention/q_norm/scale": (1536, 58),
        f"{moe}/self_attention/wq_b/kernel": (1536, 58, 128, 192),
        f"{moe}/self_attention/wkv_a/kernel": (7168, 58, 576),
        f"{moe}/self_attention/wkv_b/kernel": (512, 58, 128, 256),
        f"{moe}/self_attention/out/kernel": (128, 58, 128, 7168),
        f"{moe}/DeepSeekMoeBlock_0/shared_experts/wi_0/kernel": (7168, 58, 2048),
        f"{experts}/gate/kernel": (7168, 58, 256),
        f"{experts}/gate/bias": (58, 256),
        f"{experts}/wi_0": (256, 58, 7168, 2048),
        f"{experts}/wo": (256, 58, 2048, 7168),
    }
    assert {path: arrays[path].shape for path in expected} == expected
    bias = arrays[f"{experts}/gate/bias"]
    assert bias.dtype == "float32"
    assert {array.dtype for path, array in arrays.items() if not path.endswith("gate/bias")} == {"bfloat16"}
    part = next(p for p in arrays[f"{experts}/wi_1"].sources if p.at == (7, 2, 0, 0))
    assert part.tensor == "model.layers.5.mlp.experts.7.up_proj.weight"


def test_the_gate_bias_lies_where_its_maxtext_looks():
    config = published("deepseek3-671b").config
    tensors, path = tensors_of(config), "DeepSeekMoeBlock_0/MoeBlock_0/gate/bias"
    shapes = {
        ("0.2.5", True): by_path(plan_of(config, tensors))[f"decoder/moe_layers/{path}"].shape,
        ("main", True): by_path(plan_of(config, tensors, maxtext="main"))[f"decoder/moe_layers/{path}"].shape,
        ("main", False): by_path(plan_of(config, tensors, maxtext="main", scan_layers=False))[
            f"decoder/moe_layers_0/{path}"
        ].shape,
    }
    assert shapes == {("0.2.5", True): (58, 256), ("main", True): (256, 58), ("main", False): (256,)}


def test_llama_unscanned():
    config = published("llama3.1-405b").config
    arrays = by_path(plan_of(config, tensors_of(config), scan_layers=False))
    assert arrays["decoder/layers_125/self_attention/query/kernel"].shape == (16384, 128, 128)
    assert arrays["decoder/layers_125/self_attention/key/kernel"].shape == (16384, 8, 128)
    assert arrays["decoder/layers_0/self_attention/out/kernel"].shape == (128, 128, 16384)
    assert (
        arrays["decoder/layers_0/self_attention/query/kernel"].sources[0].tensor
        == "model.layers.0.self_attn.q_proj.weight"
    )


@pytest.mark.parametrize(("name", "exact"), [("qwen3-8b", True), ("llama3.1-8b", False), ("deepseek3-671b", True)])
def test_a_plan_says_whether_it_rounds(name, exact):
    config = published(name).config
    assert plan_of(config, tensors_of(config)).exact == exact


def test_a_tied_head_in_the_source_is_left_out_with_a_line():
    """Qwen3-0.6B has a `lm_head.weight` all the same."""
    config = published("qwen3-0.6b").config
    tensors = tensors_of(config) | {"lm_head.weight": TensorInfo("lm_head.weight", (151936, 1024), "bfloat16", "shard")}
    plan = plan_of(config, tensors)
    assert "decoder/logits_dense/kernel" not in by_path(plan)
    assert any(line.startswith("tied head: 1 tensors") for line in plan.dropped)


def test_a_plan_survives_json():
    config = published("deepseek2-16b").config
    plan = plan_of(config, tensors_of(config))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint


def small() -> tuple[dict, dict[str, TensorInfo]]:
    config = {**published("deepseek3-671b").config, "num_hidden_layers": 4, "n_routed_experts": 4}
    config.pop("quantization_config")
    return config, tensors_of(config)


def test_a_missing_tensor_is_named():
    config, tensors = small()
    del tensors["model.layers.3.mlp.experts.2.up_proj.weight"]
    with pytest.raises(BadInput, match=r"model\.layers\.3\.mlp\.experts\.2\.up_proj\.weight is missing"):
        plan_of(config, tensors)


def test_a_tensor_that_no_rule_takes_is_named():
    config, tensors = small()
    tensors["model.layers.0.extra.weight"] = TensorInfo("model.layers.0.extra.weight", (1,), "bfloat16", "shard-7")
    with pytest.raises(BadInput, match=r"shard-7: tensor model\.layers\.0\.extra\.weight matches no rule"):
        plan_of(config, tensors)


def test_a_layer_beyond_multi_token_prediction_is_not_dropped():
    config, tensors = small()
    name = "model.layers.5.input_layernorm.weight"
    tensors[name] = TensorInfo(name, (7168,), "bfloat16", "shard")
    with pytest.raises(BadInput, match=r"model\.layers\.5"):
        plan_of(config, tensors)


@pytest.mark.parametrize("model", ["deepseek3-671b", "deepseek2-16b"])
def test_an_ordinary_layer_too_many_is_not_taken_for_multi_token_prediction(model):
    config = {**published(model).config, "num_hidden_layers": 5, "n_routed_experts": 4, "num_nextn_predict_layers": 0}
    config.pop("quantization_config", None)
    tensors = tensors_of(config)
    with pytest.raises(BadInput, match="num_hidden_layers = 4"):
        plan_of({**config, "num_hidden_layers": 4, "num_nextn_predict_layers": 1}, tensors)


@pytest.mark.parametrize("dense", [2, 4])
def test_first_k_dense_replace_that_disagrees_with_the_names(dense):
    config, tensors = small()
    with pytest.raises(BadInput, match=f"first_k_dense_replace = {dense}"):
        plan_of({**config, "first_k_dense_replace": dense}, tensors)


def test_a_wrong_shape_says_what_the_config_makes_it():
    config, tensors = small()
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    tensors[name] = TensorInfo(name, (512, 7168), "bfloat16", "shard-1")
    with pytest.raises(BadInput, match=r"shard-1: .* \[512, 7168\], but config\.json gives \[576, 7168\]"):
        plan_of(config, tensors)


def test_an_integer_tensor_is_refused():
    config, tensors = small()
    name = "model.norm.weight"
    tensors[name] = TensorInfo(name, (7168,), "int32", "shard")
    with pytest.raises(BadInput, match="dtype int32"):
        plan_of(config, tensors)


@pytest.mark.parametrize("config", [{"architectures": ["Qwen3ForSequenceClassification"]}, {"architectures": []}, {}])
def test_an_unknown_architecture_is_refused_with_the_nearest(config):
    with pytest.raises(BadInput, match="Qwen3ForCausalLM"):
        family_of(ModelConfig(config, Path("config.json")))


def test_a_config_without_architectures_goes_by_its_model_type():
    assert family_of(ModelConfig({"model_type": "llama"}, Path("config.json"))) is FAMILIES["llama3.1"]


@pytest.mark.parametrize("key", ["num_attention_heads", "hidden_size", "num_hidden_layers"])
@pytest.mark.parametrize("change", ["missing", "null"])
def test_a_size_that_the_config_omits_is_named_where_the_class_has_another(key, change):
    published_config = published("qwen3-0.6b").config
    config = {name: value for name, value in published_config.items() if name != key}
    config |= {key: None} if change == "null" else {}
    tensors = tensors_of(published_config)
    with pytest.raises(
        BadInput, match=rf"; config\.json omits {key}, so the default of its class holds(\. There are|$)"
    ):
        plan_of(config, tensors)


def test_more_experts_than_there_is_memory_for():
    """The first tensor that is missing ends it; a list of all would not end."""
    config = published("qwen3-30b-a3b").config | {"num_hidden_layers": 1}
    tensors = published_tensors.tensors_of(Published(config, 0))
    experts = 2**31 - 1
    gate = tensors["model.layers.0.mlp.gate.weight"]
    tensors[gate.name] = gate._replace(shape=(experts, gate.shape[1]))
    with pytest.raises(BadInput, match=r"tensor model\.layers\.0\.mlp\.experts\.128\.gate_proj\.weight is missing"):
        plan_of(config | {"num_experts": experts}, tensors)
