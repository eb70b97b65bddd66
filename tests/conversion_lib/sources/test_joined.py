"""Rows of several tensors shown as one: any box of it, and clear words for what does not fit."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion_lib.core.boxes import whole
from conversion_lib.core.tensors import StoredSlice, TensorInfo, stored_bytes
from conversion_lib.errors import BadInput
from conversion_lib.families import qwen3_5
from conversion_lib.sources.joined import Join, joined

ROWS = [(0, 2, 4), (1, 0, 1), (0, 0, 2), (1, 1, 3)]
JOIN = Join("both.weight", ("first.weight", "second.weight"), lambda dims: ROWS)
FIRST, SECOND = np.arange(12).reshape(4, 3), np.arange(100, 109).reshape(3, 3)
TOGETHER = np.concatenate([FIRST[2:4], SECOND[0:1], FIRST[0:2], SECOND[1:3]])


class Memory:
    """A source of arrays in memory; `read_bytes` counts."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = {name.replace("_", ".", 1) + ".weight": array for name, array in arrays.items()}
        self.tensors = {
            name: TensorInfo(name, array.shape, str(array.dtype), "shard") for name, array in self.arrays.items()
        }

    def read(self, name, box=None):
        box = box or whole(self.arrays[name].shape)
        return self.arrays[name][tuple(slice(*side) for side in box)]

    def requires(self, name, box=None):
        return [StoredSlice.of(self.tensors[name], box)]


def source():
    return joined(Memory(layer_first=FIRST, layer_second=SECOND, layer_other=np.zeros((2, 2))), [JOIN], {})


@given(st.data())
def test_any_box_is_that_box_of_the_whole(data):
    def side(extent):
        return tuple(sorted(data.draw(st.lists(st.integers(0, extent), min_size=2, max_size=2, unique=True))))

    box = (side(7), side(3))
    expected = TOGETHER[slice(*box[0]), slice(*box[1])]
    np.testing.assert_array_equal(source().read("layer.both.weight", box), expected)
    assert stored_bytes(source(), "layer.both.weight", box) == expected.nbytes


def test_the_whole_and_the_others():
    both = source()
    np.testing.assert_array_equal(both.read("layer.both.weight"), TOGETHER)
    assert set(both.tensors) == {"layer.both.weight", "layer.other.weight"}
    assert both.tensors["layer.both.weight"].shape == (7, 3)
    assert both.read("layer.other.weight").shape == (2, 2)


def test_nothing_to_join_is_the_source_itself():
    plain = Memory(layer_other=FIRST)
    assert joined(plain, [JOIN], {}) is plain


def test_a_missing_companion_is_named():
    with pytest.raises(BadInput, match=r"layer\.second\.weight is missing: .*layer\.first\.weight"):
        joined(Memory(layer_first=FIRST), [JOIN], {})


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (SECOND[:2], "[2, 3], expected int64 [3, 3]"),
        (SECOND[:, :2], "[3, 2], expected int64 [3, 3]"),
        (SECOND.astype(np.int32), "int32 [3, 3], expected int64 [3, 3]"),
    ],
)
def test_a_companion_that_does_not_fit_is_named(second, said):
    with pytest.raises(BadInput, match=rf"layer\.second\.weight is .*{re.escape(said)}"):
        joined(Memory(layer_first=FIRST, layer_second=second), [JOIN], {})


def test_qwen_3_5_takes_every_row_of_its_projections_once():
    dims = {"key_heads": 2, "key_dim": 3, "value_heads": 4, "values": 20}
    for join, extents in zip(qwen3_5.JOINS, ([2 * 6 + 20, 20], [4, 4]), strict=True):
        taken = [(part, row) for part, start, stop in join.rows(dims) for row in range(start, stop)]
        assert sorted(taken) == [(part, row) for part, extent in enumerate(extents) for row in range(extent)]
