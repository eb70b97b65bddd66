"""What a conversion writes, against numpy written down by hand: one leaf of each kind that a family brings.

Every leaf of every family is held against MaxText's own in `tests/parity`; this needs no MaxText.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert, prepare
from conversion_lib.record import Target
from conversion_lib.sources.orbax import open_orbax
from tests.support.maxtext_by_hand import read_weights
from tests.support.tiny_models import make_tiny

Tensors = Callable[[str], np.ndarray]
Leaf = Callable[[str], np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's directory, built once for the module."""
    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = make_tiny(family, tmp_path_factory.mktemp("models") / family)
        return built[family]

    return get


def converted(source: Path, destination: Path, **target) -> tuple[Tensors, Leaf]:
    """The source's tensors in float32, and the leaves of what it is converted to."""
    convert(source, destination, Target(**({"save_dtype": "float32"} | target)))
    weights, written = read_weights(source), open_orbax(destination)
    return lambda name: weights[name].astype(np.float32), lambda path: written.read(f"params/params/decoder/{path}")


def heads(weight: np.ndarray, count: int) -> np.ndarray:
    return weight.T.reshape(weight.shape[1], count, -1)


def test_mixtral(model, tmp_path):
    tensor, leaf = converted(model("mixtral"), tmp_path / "out")
    at = "model.layers.2"
    query = heads(tensor(f"{at}.self_attn.q_proj.weight"), 6) * np.float32(1 / np.sqrt(32))
    np.testing.assert_array_equal(leaf("layers/self_attention/query/kernel")[:, 2], query)
    moe = f"{at}.block_sparse_moe"
    np.testing.assert_array_equal(leaf("layers/MoeBlock_0/gate/kernel")[:, 2], tensor(f"{moe}.gate.weight").T)
    for name, to in (("w1", "wi_0"), ("w3", "wi_1"), ("w2", "wo")):
        expert = tensor(f"{moe}.experts.5.{name}.weight").T
        np.testing.assert_array_equal(leaf(f"layers/MoeBlock_0/{to}")[5, 2], expert)


def test_qwen_2_5(model, tmp_path):
    tensor, leaf = converted(model("qwen2.5"), tmp_path / "out")
    bias = tensor("model.layers.3.self_attn.k_proj.bias").reshape(2, 32)
    np.testing.assert_array_equal(leaf("layers/self_attention/key/bias")[:, 3], bias)


def test_gpt_oss(model, tmp_path):
    tensor, leaf = converted(model("gpt_oss"), tmp_path / "out")
    experts, to = "model.layers.3.mlp.experts", "layers/layers_1/GptOssMlp"  # the second of its place in the cycle
    for index, name in enumerate(("wi_0", "wi_1")):
        np.testing.assert_array_equal(leaf(f"{to}/{name}")[:, 1], tensor(f"{experts}.gate_up_proj")[..., index::2])
        bias = tensor(f"{experts}.gate_up_proj_bias")[:, index::2]
        np.testing.assert_array_equal(leaf(f"{to}/{name}_bias")[:, 1], bias)
    np.testing.assert_array_equal(leaf(f"{to}/wo")[:, 1], tensor(f"{experts}.down_proj"))
    sinks = tensor("model.layers.3.self_attn.sinks")
    np.testing.assert_array_equal(leaf("layers/layers_1/GptOssAttention/sinks")[:, 1], sinks)


def test_a_tensor_that_makes_two_leaves_counts_once(model):
    source = model("gpt_oss")
    job = prepare(source, Target(), memory_budget=1 << 30)
    assert job.bytes_in == 2 * sum(array.size for array in read_weights(source).values())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_next", "deepseek_v3"])
def test_the_names_of_transformers_class(model, tmp_path, family):
    """As `save_pretrained(save_original_format=False)` writes them: experts in one tensor, Mixtral's in `mlp`."""
    own = make_tiny(family, tmp_path / "own", own_names=True)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in read_weights(own))
    for scan_layers in (True, False):
        outs = [tmp_path / f"{name}-{scan_layers}" for name in ("published", "own")]
        for source, out in zip((model(family), own), outs, strict=True):
            convert(source, out, Target(scan_layers=scan_layers))
        assert compare(*outs).same


def test_gemma_2_in_bfloat16(model, tmp_path):
    tensor, leaf = converted(model("gemma2"), tmp_path / "out", save_dtype="bfloat16")
    norm = leaf("layers/pre_ffw_norm_global/scale")
    np.testing.assert_array_equal(norm[:, 1], tensor("model.layers.3.pre_feedforward_layernorm.weight") + 1)
    query = heads(tensor("model.layers.2.self_attn.q_proj.weight"), 4) * np.float32(1 / np.sqrt(32))
    written = leaf("layers/self_attention_local/query/kernel")[:, 1]
    np.testing.assert_array_equal(written.view(np.uint16), query.astype(ml_dtypes.bfloat16).view(np.uint16))
    table = open_orbax(tmp_path / "out").read("params/params/token_embedder/embedding")
    np.testing.assert_array_equal(table.astype(np.float32), 8 * tensor("model.embed_tokens.weight"))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_gemma_3_after_its_last_whole_block(model, tmp_path, scan_layers):
    tensor, leaf = converted(model("gemma3"), tmp_path / "out", scan_layers=scan_layers)
    at = "language_model.model.layers.13"
    to = "layers_remainder/layers_1" if scan_layers else "layers_13"
    np.testing.assert_array_equal(leaf(f"{to}/mlp/wo/kernel"), tensor(f"{at}.mlp.down_proj.weight").T)
    norm = leaf(f"{to}/self_attention/query_norm/scale")
    np.testing.assert_array_equal(norm, tensor(f"{at}.self_attn.q_norm.weight") + 1)


def test_gemma_4(model, tmp_path):
    tensor, leaf = converted(model("gemma4"), tmp_path / "out")
    local, to = "model.language_model.layers.8", "scanned_blocks/local_layers"  # the second block's third
    routed = f"{to}/mlp/moe_block/MoeBlock_0"
    for half, name in zip(np.split(tensor(f"{local}.experts.gate_up_proj"), 2, axis=1), ("wi_0", "wi_1"), strict=True):
        np.testing.assert_array_equal(leaf(f"{routed}/{name}")[:, 1, 2], half.transpose(0, 2, 1))
    down = tensor(f"{local}.experts.down_proj").transpose(0, 2, 1)
    np.testing.assert_array_equal(leaf(f"{routed}/wo")[:, 1, 2], down)
    np.testing.assert_array_equal(leaf(f"{to}/layer_scalar")[:, 1, 2], tensor(f"{local}.layer_scalar"))
    key = heads(tensor("model.language_model.layers.11.self_attn.k_proj.weight"), 1)
    np.testing.assert_array_equal(leaf("scanned_blocks/global_layer/self_attention/key/kernel")[:, 1], key)


def test_gemma_4_small(model, tmp_path):
    tensor, leaf = converted(model("gemma4_small"), tmp_path / "out", scan_layers=False)
    at = "model.language_model"
    wide = tensor(f"{at}.layers.9.mlp.up_proj.weight").T
    assert wide.shape[1] == 2 * 160
    np.testing.assert_array_equal(leaf("layers_9/mlp/wi_1/kernel"), wide)
    inputs = tensor(f"{at}.per_layer_model_projection.weight").T
    np.testing.assert_array_equal(leaf("per_layer_embedder/per_layer_model_projection/kernel"), inputs)
    written = {path for path in open_orbax(tmp_path / "out").tensors if "/key/" in path}
    assert written == {f"params/params/decoder/layers_{layer}/self_attention/key/kernel" for layer in range(5)}


def test_qwen_3_next(model, tmp_path):
    tensor, leaf = converted(model("qwen3_next"), tmp_path / "out")
    net, to = "model.layers.6.linear_attn", "layers/local_layers"  # the second block's third
    taps = tensor(f"{net}.conv1d.weight").transpose(2, 1, 0)
    np.testing.assert_array_equal(leaf(f"{to}/attention/conv1d/kernel")[:, 1, 2], taps)
    expert = tensor("model.layers.6.mlp.experts.7.up_proj.weight").T
    np.testing.assert_array_equal(leaf(f"{to}/mlp/routed_experts/wi_1")[7, 1, 2], expert)
    query = heads(tensor("model.layers.7.self_attn.q_proj.weight"), 6)
    np.testing.assert_array_equal(leaf("layers/global_layer/attention/attention/query/kernel")[:, 1], query)


def test_qwen_3_5_as_published_and_expert_by_expert(model, tmp_path):
    tensor, leaf = converted(model("qwen3.5"), tmp_path / "fused")
    net, to = "model.language_model.layers.6.linear_attn", "layers/layer_2"
    keys, key_dim, value_dim = 2, 24, 28
    queries, keys_, values = np.split(tensor(f"{net}.in_proj_qkv.weight"), [keys * key_dim, 2 * keys * key_dim])
    parts = [queries, keys_, values, tensor(f"{net}.in_proj_z.weight")]
    by_head = np.concatenate([part.reshape(keys, -1, 96) for part in parts], axis=1)
    assert by_head.shape[1] == 2 * key_dim + 2 * 2 * value_dim
    written = leaf(f"{to}/attention/in_proj_qkvz/kernel")[:, 1]
    np.testing.assert_array_equal(written, by_head.reshape(-1, 96).T)
    both = [tensor(f"{net}.in_proj_{name}.weight").reshape(keys, -1, 96) for name in "ba"]
    written = leaf(f"{to}/attention/in_proj_ba/kernel")[:, 1]
    np.testing.assert_array_equal(written, np.concatenate(both, axis=1).reshape(-1, 96).T)

    apart = make_tiny("qwen3.5", tmp_path / "model", own_names=False)
    _, one_by_one = converted(apart, tmp_path / "apart")
    for name in ("wi_0", "wi_1", "wo"):
        path = f"layers/layer_3/mlp/routed_experts/{name}"
        np.testing.assert_array_equal(one_by_one(path), leaf(path))


def test_olmo_3(model, tmp_path):
    tensor, leaf = converted(model("olmo3"), tmp_path / "out")
    norm = tensor("model.layers.5.self_attn.k_norm.weight")
    np.testing.assert_array_equal(leaf("layers/layers_1/attention/key_norm/scale")[:, 1], norm)
