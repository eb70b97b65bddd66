"""The weights of a MaxText checkpoint under one set of names, in each tree that is met."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conversion_lib.core.boxes import slices
from conversion_lib.sources.maxtext import MaxTextSource, canonical
from tests.support.orbax_trees import Leaves, linen, nnx, nnx_below, write_tree

LEAVES: Leaves = {
    ("token_embedder", "embedding"): np.arange(6, dtype=np.float32).reshape(3, 2),
    ("decoder", "layers_0", "mlp", "wi_0", "kernel"): np.arange(4, dtype=np.float32),
    ("decoder", "layers_1", "mlp", "wi_0", "kernel"): np.arange(4, 8, dtype=np.float32),
}


@pytest.mark.parametrize(
    ("stored", "path"),
    [
        ("params/params/decoder/layers/mlp/wi_0/kernel", "params/params/decoder/layers/mlp/wi_0/kernel"),
        ("params/decoder/layers/3/mlp/wo/kernel/value", "params/params/decoder/layers_3/mlp/wo/kernel"),
        ("decoder/moe_layers/12/gate/bias", "params/params/decoder/moe_layers_12/gate/bias"),
        ("base/token_embedder/embedding/value", "params/params/token_embedder/embedding"),
        ("nnx_aux/model/decoder/moe_layers/gate/bias", "params/params/decoder/moe_layers/gate/bias"),
        ("params/params/other/kernel", "params/params/other/kernel"),
    ],
)
def test_a_leaf_has_one_name(stored: str, path: str):
    assert canonical(tuple(stored.split("/"))) == path


@pytest.mark.parametrize("shape", [linen, nnx, nnx_below("params"), nnx_below("model")])
def test_the_same_weights_from_every_tree(tmp_path: Path, shape):
    source = MaxTextSource(write_tree(tmp_path / "out", shape(LEAVES)))
    assert set(source.tensors) == {"/".join(["params/params", *map(str, keys)]) for keys in LEAVES}
    for keys, array in LEAVES.items():
        name = "/".join(["params/params", *map(str, keys)])
        inner = tuple((1, size) for size in array.shape)
        np.testing.assert_array_equal(source.read(name, inner), array[slices(inner)])
        assert source.tensors[name].shape == array.shape


def test_what_is_not_read_is_counted(tmp_path: Path):
    source = MaxTextSource(write_tree(tmp_path / "out", linen(LEAVES)))
    assert [line.partition(";")[0] for line in source.not_read] == [
        "nnx_aux: 1 arrays are not read",
        "opt_state: 7 arrays are not read",
    ]
    assert source.maxtext is None
