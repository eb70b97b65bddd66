"""Plans of published models at their true sizes: everything is taken once, what is left out is named."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest

from conversion_lib.core.boxes import Box, size
from conversion_lib.core.tensors import Array, StoredSlice, TensorInfo
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.mapping.to_maxtext import plan_to_maxtext
from conversion_lib.models.catalog import MODELS as CATALOGUE
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.plan import ArrayPlan, Plan
from conversion_lib.record import Target
from conversion_lib.sources.joined import joined
from tests.support.published_configs import PUBLISHED, published_tensors

LAYOUTS = [
    (name, scan_layers) for name in PUBLISHED for scan_layers in (True, False) if not (scan_layers and "4-e" in name)
]
each = pytest.mark.parametrize(("name", "scan_layers"), LAYOUTS)

OTHER_MODALITIES = ("vision_tower", "multi_modal_projector", "embed_vision", "visual.")
"""What the names of all tensors that are not the text model's have."""


class Listed:
    """A source of names and shapes alone."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors

    def read(self, name: str, box: Box | None = None) -> Array:
        raise AssertionError("a plan reads nothing")

    def requires(self, name: str, box: Box | None = None) -> list[StoredSlice]:
        raise AssertionError("a plan reads nothing")


@cache
def tensors_of(name: str) -> dict[str, TensorInfo]:
    return published_tensors(PUBLISHED[name][0])


@cache
def joined_tensors_of(name: str) -> dict[str, TensorInfo]:
    """As the tables take them."""
    config = ModelConfig(PUBLISHED[name][0], Path("config.json"))
    family = family_of(config)
    return dict(joined(Listed(tensors_of(name)), family.joins, family.dims(config)).tensors)


def plan_of(name: str, *, tensors: dict[str, TensorInfo] | None = None, **target) -> Plan:
    config = ModelConfig(PUBLISHED[name][0], Path("config.json"))
    options = {"identity": {}, "model_name": name, "chunk_limit": 64 << 20}
    found = joined_tensors_of(name) if tensors is None else tensors
    return plan_to_maxtext(found, config, family_of(config), Target(**target), **options)


def by_path(plan: Plan) -> dict[str, ArrayPlan]:
    return {array.path.removeprefix("params/params/"): array for array in plan.arrays}


def sources_read(plan: Plan) -> dict[str, set[tuple[str, int]]]:
    """For each tensor, the parts of it that are taken: leaf and place."""
    read: dict[str, set[tuple[str, int]]] = {}
    for array in plan.arrays:
        for part in array.sources:
            read.setdefault(part.tensor, set()).add((array.path, part.at))
    return read


@each
def test_every_parameter_of_a_published_model_is_taken_once(name, scan_layers):
    tensors = joined_tensors_of(name)
    plan = plan_of(name, scan_layers=scan_layers)
    text = {tensor for tensor in tensors if not any(word in tensor for word in OTHER_MODALITIES)}
    assert set(sources_read(plan)) == text
    parameters = PUBLISHED[name][1]
    assert sum(math.prod(tensors[tensor].shape) for tensor in text) == parameters
    elements = sum(math.prod(array.shape) for array in plan.arrays)
    embedding = by_path(plan)["token_embedder/embedding"]
    vocabulary = tensors[embedding.sources[0].tensor].shape[0]
    assert elements - (embedding.shape[0] - vocabulary) * embedding.shape[1] == parameters
    assert any(line.startswith("vision") for line in plan.dropped) == (text != set(tensors))
    assert sum(math.prod(info.shape) for info in tensors_of(name).values()) == sum(
        math.prod(info.shape) for info in tensors.values()
    )


@each
def test_sources_tile_their_arrays(name, scan_layers):
    plan = plan_of(name, scan_layers=scan_layers)
    assert len({array.path for array in plan.arrays}) == len(plan.arrays)
    for array in plan.arrays:
        assert len(array.sources) * size(array.region(array.sources[0])) == math.prod(array.shape)
        assert len({part.at for part in array.sources}) == len(array.sources)


def test_the_catalogue_has_them_all():
    families = {model.name: model.family for model in CATALOGUE}
    for name, (config, _) in PUBLISHED.items():
        assert family_of(ModelConfig(config, Path("config.json"))) is FAMILIES[families[name]]


@pytest.mark.parametrize(
    ("name", "norms"), [("gemma2-2b", "float32"), ("gemma3-4b", "float32"), ("gemma4-31b", "bfloat16")]
)
def test_norms_that_are_one_plus_a_weight_are_float32_as_maxtext_writes_them(name, norms):
    dtypes = {(path.endswith("/scale"), array.dtype) for path, array in by_path(plan_of(name)).items()}
    assert dtypes == {(True, norms), (False, "bfloat16")}


def test_the_vocabulary_of_gemma_2_is_padded_and_says_so():
    plan = plan_of("gemma2-2b")
    assert by_path(plan)["token_embedder/embedding"].shape == (256128, 2304)
    assert any("128 rows of zeros" in line for line in plan.dropped)


def test_the_vocabulary_of_gemma_3_is_cut_and_says_so():
    plan = plan_of("gemma3-4b")
    assert by_path(plan)["token_embedder/embedding"].shape == (262144, 2560)
    assert any("its last 64 rows are left out" in line for line in plan.dropped)
    assert not plan.exact


@pytest.mark.parametrize(
    ("name", "leaf", "shape", "tensor"),
    [
        (
            "gpt-oss-20b",
            "decoder/layers/layers_1/GptOssMlp/wi_0",
            (32, 12, 2880, 2880),
            "model.layers.3.mlp.experts.gate_up_proj",
        ),
        (
            "gpt-oss-20b",
            "decoder/layers/layers_1/GptOssAttention/sinks",
            (64, 12),
            "model.layers.3.self_attn.sinks",
        ),
        (
            "mixtral-8x22b",
            "decoder/layers/MoeBlock_0/gate/kernel",
            (6144, 56, 8),
            "model.layers.1.block_sparse_moe.gate.weight",
        ),
        (
            "gemma2-9b",
            "decoder/layers/self_attention_global/query/kernel",
            (3584, 21, 16, 256),
            "model.layers.3.self_attn.q_proj.weight",
        ),
        (
            "gemma3-4b",
            "decoder/layers/layers_5/mlp/wo/kernel",
            (10240, 5, 2560),
            "language_model.model.layers.11.mlp.down_proj.weight",
        ),
        (
            "gemma4-26b",
            "decoder/scanned_blocks/global_layer/self_attention/key/kernel",
            (2816, 5, 2, 512),
            "model.language_model.layers.11.self_attn.k_proj.weight",
        ),
        (
            "gemma4-26b",
            "decoder/scanned_blocks/local_layers/mlp/moe_block/MoeBlock_0/wi_1",
            (128, 5, 5, 2816, 704),
            "model.language_model.layers.6.experts.gate_up_proj",
        ),
        (
            "qwen3-next-80b-a3b",
            "decoder/layers/local_layers/mlp/routed_experts/wi_0",
            (512, 12, 3, 2048, 512),
            "model.layers.4.mlp.experts.0.gate_proj.weight",
        ),
        (
            "qwen3.5-397b-a17b",
            "decoder/layers/layer_2/attention/in_proj_qkvz/kernel",
            (4096, 15, 20480),
            "model.language_model.layers.6.linear_attn.in_proj_{qkv,z}.weight",
        ),
        (
            "olmo3-32b",
            "decoder/layers/layers_2/attention/key/kernel",
            (5120, 16, 8, 128),
            "model.layers.6.self_attn.k_proj.weight",
        ),
    ],
)
def test_where_the_second_layer_of_a_stack_comes_from(name, leaf, shape, tensor):
    """Shapes as MaxText 0.2.5 has them for the model of that name."""
    array = by_path(plan_of(name))[leaf]
    assert array.shape == shape
    second = next(part for part in array.sources if part.at == (0, 1, *[0] * (len(shape) - 2)))
    assert second.tensor == tensor


def test_the_layers_after_the_last_whole_block_of_gemma_3_lie_outside_the_scan():
    arrays = by_path(plan_of("gemma3-4b"))
    assert arrays["decoder/layers_remainder/layers_3/mlp/wo/kernel"].shape == (10240, 2560)
    assert (
        arrays["decoder/layers_remainder/layers_3/mlp/wo/kernel"].sources[0].tensor
        == "language_model.model.layers.33.mlp.down_proj.weight"
    )
    assert not any(path.startswith("decoder/layers_remainder/layers_4") for path in arrays)


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_gemma_3_under_its_other_names(prefix):
    """As transformers' class has it, and as a text model alone."""
    renamed = {
        name.replace("language_model.model.", prefix): info
        for name, info in tensors_of("gemma3-4b").items()
        if prefix != "model." or name.startswith("language_model.")
    }
    renamed = {name: TensorInfo(name, info.shape, info.dtype, info.file) for name, info in renamed.items()}
    plan, usual = plan_of("gemma3-4b", tensors=renamed), plan_of("gemma3-4b")
    assert [array.shape for array in plan.arrays] == [array.shape for array in usual.arrays]
    assert {part.tensor for array in plan.arrays for part in array.sources} <= set(renamed)


def test_parts_of_a_fused_tensor_make_two_leaves():
    read = sources_read(plan_of("gpt-oss-20b"))
    assert {leaf.rpartition("/")[2] for leaf, _ in read["model.layers.0.mlp.experts.gate_up_proj"]} == {"wi_0", "wi_1"}
