"""Exports of checkpoints that Ferry did not write: trees of training runs, in every storage, with what is no weight."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.export import export
from conversion_lib.errors import BadInput
from conversion_lib.progress import Reporter
from conversion_lib.record import Target
from tests.support.checkpoints import DEEPSEEK_V3, QWEN3, random_tensors, write_checkpoint
from tests.support.orbax_trees import Leaves, Shape, linen, model_leaves, nnx, nnx_below, write_tree
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors

BIAS = ("decoder", "moe_layers", "DeepSeekMoeBlock_0", "MoeBlock_0", "gate", "bias")


class Model:
    """A source, what it was converted to in both layouts, and what one of them was exported to."""

    def __init__(self, at: Path, config: dict, tensors: dict) -> None:
        self.hf = write_checkpoint(at / "hf", config, tensors)
        self.leaves: dict[bool, Leaves] = {}
        for scan in (True, False):
            convert(self.hf, at / f"maxtext-{scan}", Target(scan_layers=scan))
            self.leaves[scan] = model_leaves(at / f"maxtext-{scan}")
        self.back = at / "back"
        export(at / "maxtext-True", self.back)


class Listener(Reporter):
    def __init__(self) -> None:
        super().__init__("quiet")
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("qwen3"), QWEN3, random_tensors(llama_tensors(QWEN3)))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = DEEPSEEK_V3 | {"n_routed_experts": 2, "num_hidden_layers": 3, "first_k_dense_replace": 1}
    return Model(tmp_path_factory.mktemp("deepseek"), config, random_tensors(deepseek_tensors(config)))


SHAPES = {
    "linen": linen,
    "nnx": nnx,
    "nnx-params": nnx_below("params"),
    "nnx-base": nnx_below("base"),
    "nnx-model": nnx_below("model"),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trees_of_training(qwen3: Model, tmp_path: Path, shape: Shape, scan: bool):
    out = write_tree(tmp_path / "train", shape(qwen3.leaves[scan]))
    result = export(out, tmp_path / "back", hf_config=qwen3.hf)
    assert compare(tmp_path / "back", qwen3.back).same
    assert result.bytes_in < 1.05 * sum(array.nbytes for array in qwen3.leaves[scan].values())


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("zarr3", [True, False])
def test_every_storage(qwen3: Model, tmp_path: Path, ocdbt: bool, zarr3: bool):
    out = write_tree(tmp_path / "train", linen(qwen3.leaves[True]), ocdbt=ocdbt, zarr3=zarr3)
    export(out / "0", tmp_path / "back", hf_config=qwen3.hf)
    assert compare(tmp_path / "back", qwen3.back).same


def test_optimizer_state_is_never_read(qwen3: Model, tmp_path: Path):
    out = write_tree(tmp_path / "train", linen(qwen3.leaves[True]), ocdbt=False)
    gone = [path for path in (out / "0" / "items").iterdir() if path.name.startswith("opt_state")]
    assert len(gone) > 2 * len(qwen3.leaves[True])
    for path in gone:
        shutil.rmtree(path)
    listener = Listener()
    export(out, tmp_path / "back", hf_config=qwen3.hf, reporter=listener)
    assert compare(tmp_path / "back", qwen3.back).same
    assert any(line.startswith(f"opt_state: {len(gone)} arrays are not read") for line in listener.said)


def test_float32_weights_are_rounded_once(qwen3: Model, tmp_path: Path):
    wide = {keys: array.astype(np.float32) for keys, array in qwen3.leaves[False].items()}
    out = write_tree(tmp_path / "train", linen(wide))
    export(out, tmp_path / "back", hf_config=qwen3.hf)
    assert compare(tmp_path / "back", qwen3.back).same


@pytest.mark.parametrize("before", [("nnx_aux", "model"), ("params", "MoEBiasVar")])
def test_a_routers_bias_that_is_no_parameter(deepseek: Model, tmp_path: Path, before: tuple[str, ...]):
    """As MaxText 0.2.5 stores it: layers first. With as many layers as experts only its place tells so."""
    leaves = deepseek.leaves[True]
    assert leaves[BIAS].shape == (2, 2)
    tree = linen({keys: array for keys, array in leaves.items() if keys != BIAS}) | {(*before, *BIAS): leaves[BIAS]}
    export(write_tree(tmp_path / "train", tree), tmp_path / "back", hf_config=deepseek.hf)
    assert compare(tmp_path / "back", deepseek.back).same


def test_the_order_of_a_square_bias_must_be_said(deepseek: Model, tmp_path: Path):
    leaves = deepseek.leaves[True]
    out = write_tree(tmp_path / "train", linen(leaves | {BIAS: leaves[BIAS].T}))
    with pytest.raises(BadInput, match=r"gate/bias has shape \[2, 2\].*--written-by"):
        export(out, tmp_path / "back", hf_config=deepseek.hf)
    export(out, tmp_path / "back", hf_config=deepseek.hf, written_by="main")
    assert compare(tmp_path / "back", deepseek.back).same


def without(leaves: Leaves) -> Leaves:
    return {keys: array for keys, array in leaves.items() if keys[-3:] != ("mlp", "wo", "kernel")}


def with_more(leaves: Leaves) -> Leaves:
    return leaves | {("decoder", "extra", "kernel"): np.zeros(3, np.float32)}


def misshapen(leaves: Leaves) -> Leaves:
    return {keys: array[..., :-1] if keys[-1] == "embedding" else array for keys, array in leaves.items()}


def of_integers(leaves: Leaves) -> Leaves:
    return {keys: array.astype(np.int32) if keys[-1] == "embedding" else array for keys, array in leaves.items()}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without, "leaf params/params/decoder/layers/mlp/wo/kernel is missing"),
        (with_more, r"leaf params/params/decoder/extra/kernel \[3\] matches no rule of family qwen3"),
        (misshapen, r"token_embedder/embedding has shape \[101, 23\].*gives \[101, 24\]"),
        (of_integers, "token_embedder/embedding has dtype int32, expected one of"),
    ],
)
def test_what_does_not_fit_the_config_is_refused(qwen3: Model, tmp_path: Path, spoil: Shape, says: str):
    out = write_tree(tmp_path / "train", linen(spoil(qwen3.leaves[True])))
    with pytest.raises(BadInput, match=says):
        export(out, tmp_path / "back", hf_config=qwen3.hf)
    assert not (tmp_path / "back").exists()


def test_without_a_config_it_says_how_to_give_one(qwen3: Model, tmp_path: Path):
    out = write_tree(tmp_path / "train", linen(qwen3.leaves[True]))
    with pytest.raises(BadInput, match="--hf-config"):
        export(out, tmp_path / "back")
    with pytest.raises(BadInput, match=re.escape(f"{tmp_path / 'nowhere'} has no config.json")):
        export(out, tmp_path / "back", hf_config=tmp_path / "nowhere")


def test_a_weight_in_two_places_is_refused(qwen3: Model, tmp_path: Path):
    leaves = qwen3.leaves[True]
    twice = linen(leaves) | {("nnx_aux", "model", "decoder", "decoder_norm", "scale"): np.ones(24, np.float32)}
    with pytest.raises(BadInput, match="are both params/params/decoder/decoder_norm/scale"):
        export(write_tree(tmp_path / "train", twice), tmp_path / "back", hf_config=qwen3.hf)
