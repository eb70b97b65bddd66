"""Names of a checkpoint against a family's table: other prefixes, buffers, an index that names too much."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.mapping.to_maxtext import plan_to_maxtext
from conversion_lib.models.catalog import MODELS
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.plan import Plan
from conversion_lib.record import Target
from conversion_lib.sources.joined import joined
from tests.support.family import published
from tests.support.published_tensors import Listed, tensors_of

ONE_OF_EACH = {model.family: model.name for model in reversed(MODELS)}


def plan_of(config: dict, tensors: dict[str, TensorInfo], absent: dict[str, str] | None = None) -> Plan:
    model = ModelConfig(config, Path("config.json"))
    family = family_of(model)
    target = Target(scan_layers=bool(family.scanned))
    shown = joined(Listed(tensors), family.joins, family.sizes(model)).tensors
    return plan_to_maxtext(
        shown, model, family, target, identity={}, model_name="m", chunk_limit=64 << 20, absent=absent
    )


def info(name: str, *shape: int, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name, shape, dtype, "shard")


def renamed(tensors: dict[str, TensorInfo], before: str, after: str) -> dict[str, TensorInfo]:
    names = {name: after + name.removeprefix(before) if name.startswith(before) else name for name in tensors}
    return {names[name]: old._replace(name=names[name]) for name, old in tensors.items()}


BUFFERS = {
    "rotary tables": [
        info("model.rotary_emb.inv_freq", 16),
        info("model.rotary_emb.original_inv_freq", 16),
        info("model.layers.0.self_attn.rotary_emb.inv_freq", 16),
        info("model.layers.0.self_attn.rotary_emb.cos_cached", 1, 1, 64, 32),
        info("model.layers.0.self_attn.rotary_emb.sin_cached", 1, 1, 64, 32),
        info("model.rotary_emb.sliding_attention_inv_freq", 16),
        info("model.rotary_emb.full_attention_original_inv_freq", 16),
        info("model.rotary_emb_local.inv_freq", 16),
        info("rotary_emb.inv_freq", 16),
        info("model.language_model.rotary_emb.inv_freq", 16),
    ],
    "causal masks": [
        info("model.layers.0.self_attn.bias", 1, 1, 64, 64, dtype="bool"),
        info("model.layers.0.attn.bias", 1, 1, 64, 64, dtype="uint8"),
        info("model.layers.0.attention.causal_mask", 64, 64, dtype="bool"),
        info("model.causal_mask", 64, 64),
    ],
    "constants of masks": [
        info("model.layers.0.attn.masked_bias"),
        info("model.layers.0.self_attn.masked_bias", 1),
        info("model.position_ids", 1, 64, dtype="int64"),
    ],
    "activation scales": [
        info("model.layers.0.self_attn.k_scale"),
        info("model.layers.0.self_attn.kv_scale", 1),
        info("model.layers.0.self_attn.q_proj.input_scale", 1, 1),
        info("model.layers.0.mlp.down_proj.input_scale_ub", 1),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_leaves_out_buffers_and_says_so(family):
    config = published(ONE_OF_EACH[family]).config
    tensors = tensors_of(published(ONE_OF_EACH[family]))
    before = plan_of(config, tensors)
    extra = {one.name: one for kind in BUFFERS.values() for one in kind}
    plan = plan_of(config, tensors | extra)
    assert plan.arrays == before.arrays
    told = [line for line in plan.dropped if line not in before.dropped]
    assert [line.partition(" tensors left out")[0] for line in told] == [
        f"{kind}: {len(found)}" for kind, found in BUFFERS.items()
    ]


@pytest.mark.parametrize(
    "stranger",
    [
        info("model.layers.0.self_attn.bias", 64),  # as a bias that is learned
        info("model.layers.0.self_attn.qk_scale", 1),
        info("model.layers.0.self_attn.inv_freqs", 16),
        info("model.layers.0.mlp.mask", 8, 8),
        info("model.layers.0.self_attn.rotary_emb.weight", 16),
    ],
)
def test_what_only_looks_like_one_is_refused(stranger):
    config = published("qwen3-0.6b").config
    with pytest.raises(BadInput, match=f"tensor {stranger.name} matches no rule"):
        plan_of(config, tensors_of(published("qwen3-0.6b")) | {stranger.name: stranger})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_known_without_the_base_class_s_prefix(family):
    """As a base class saves itself: `layers.0`, and of a model with towers `language_model.layers.0`."""
    config = published(ONE_OF_EACH[family]).config
    tensors = tensors_of(published(ONE_OF_EACH[family]))
    plain = renamed(tensors, "model.", "")
    assert plain.keys() != tensors.keys() or family == "gemma3"  # whose names begin with language_model.
    before, after = plan_of(config, tensors), plan_of(config, plain)
    assert [array.path for array in after.arrays] == [array.path for array in before.arrays]
    assert [line.partition(":")[0] for line in after.dropped] == [line.partition(":")[0] for line in before.dropped]


def test_where_no_name_fits_those_that_are_there_are_told():
    config = published("qwen3-0.6b").config
    tensors = {name: info(name, 4) for name in ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight")}
    with pytest.raises(BadInput) as raised:
        plan_of(config, tensors)
    assert str(raised.value) == (
        "tensor model.embed_tokens.weight is missing: params/params/token_embedder/embedding needs it. "
        "There are 2 tensors: transformer.wte.weight, transformer.h.0.attn.c_attn.weight"
    )
    with pytest.raises(BadInput, match="There are 0 tensors: none"):
        plan_of(config, {})


def test_of_many_names_the_nearest_are_told():
    config = published("qwen3-0.6b").config
    tensors = tensors_of(published("qwen3-0.6b"))
    other = {name.replace("q_norm", "query_norm"): one for name, one in tensors.items()}
    with pytest.raises(BadInput, match=r"q_norm\.weight is missing.*There are 310 tensors, such as"):
        plan_of(config, other)
    moved = {name.replace("model.layers.0.", "model.blocks.0."): one for name, one in tensors.items()}
    with pytest.raises(BadInput, match=r"such as model\.blocks\.0\.input_layernorm\.weight"):
        plan_of(config, moved)


def test_a_head_that_is_missing_says_that_the_config_unties_it():
    """transformers would make a new one, of random values."""
    config = {**published("qwen3-0.6b").config, "tie_word_embeddings": False}
    tensors = tensors_of(published("qwen3-0.6b"))
    tensors.pop("lm_head.weight", None)
    with pytest.raises(BadInput, match=r"lm_head\.weight is missing.*does not tie it to the embedding"):
        plan_of(config, tensors)


GHOSTS = {
    "qwen3-next-80b-a3b": (["mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"], "multi-token prediction: 2"),
    "deepseek3-671b": (
        ["model.layers.61.eh_proj.weight", "model.layers.61.mlp.experts.3.up_proj.weight_scale_inv"],
        "multi-token prediction: 2",
    ),
    "qwen3-0.6b": (["lm_head.weight"], "tied head: 1"),
    "qwen3-8b": (["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.attn.bias"], "rotary tables: 1"),
    "llama3.1-8b": (["model.layers.0.self_attn.k_scale"], "activation scales: 1"),
    "gemma3-4b": (["vision_tower.vision_model.head.weight"], "vision tower: 1"),
}


@pytest.mark.parametrize("model", GHOSTS)
def test_what_the_index_names_and_no_shard_has_may_be_missing_where_it_is_left_out(model):
    config = published(model).config
    names, line = GHOSTS[model]
    tensors = {name: one for name, one in tensors_of(published(model)).items() if name not in names}
    tensors = {name: one for name, one in tensors.items() if not name.startswith("model.layers.61.")}
    plan = plan_of(config, tensors, dict.fromkeys(names, "model-00007.safetensors"))
    assert plan.arrays == plan_of(config, tensors).arrays
    assert any(told.startswith(f"{line} tensors are in the index alone") for told in plan.dropped), plan.dropped


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "model.layers.3.extra.weight",
            "is in model.safetensors.index.json, but not in shard-7, and no rule of family qwen3 leaves it out",
        ),
        (
            "model.layers.3.input_layernorm.weight",
            "is missing: .* model.safetensors.index.json names it in shard-7, which does not",
        ),
    ],
)
def test_what_it_names_is_refused_elsewhere(name, words):
    config = published("qwen3-0.6b").config
    tensors = tensors_of(published("qwen3-0.6b"))
    tensors.pop(name, None)
    with pytest.raises(BadInput, match=f"tensor {name} {words}"):
        plan_of(config, tensors, {name: "shard-7"})


def test_an_ordinary_layer_in_the_index_is_not_taken_for_multi_token_prediction():
    config = published("deepseek3-671b").config
    tensors = {n: t for n, t in tensors_of(published("deepseek3-671b")).items() if not n.startswith("model.layers.61.")}
    with pytest.raises(BadInput, match=r"model\.layers\.61\.mlp\.gate\.weight is in model\.safetensors\.index"):
        plan_of(config, tensors, {"model.layers.61.mlp.gate.weight": "shard-7"})


def test_a_layer_of_a_thousand_digits():
    config = published("deepseek3-671b").config
    name = f"model.layers.{'9' * 5000}.mlp.gate.weight"
    with pytest.raises(BadInput, match="matches no rule"):
        plan_of(config, tensors_of(published("deepseek3-671b")) | {name: info(name, 1)})
