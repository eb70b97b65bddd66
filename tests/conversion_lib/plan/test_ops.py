"""Ops by property: the inverse undoes the forward, shapes agree, and any slice equals that slice of the whole."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from conversion_lib.core.boxes import box_shape, slices
from conversion_lib.errors import BadInput
from conversion_lib.plan import ops
from conversion_lib.plan.ops import Expand, Interleave, Merge, Op, Permute, Pick, Split, Squeeze, Transpose
from conversion_lib.plan.value_ops import Resize, Scale, ScaleEmbedding, Shift

SMALL = st.integers(1, 6)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Op, ...]]:
    """A chain like the tables have, with its input shape."""
    n, m, width = draw(SMALL), draw(SMALL) * 2, draw(SMALL)
    kind = draw(st.sampled_from(["linear", "heads in", "heads out", "rope", "vector", "merge", "permute", "pad"]))
    if kind == "vector":
        shape, chain = (width,), ()
    elif kind == "linear":
        shape, chain = (n, width), (Transpose(),)
    elif kind == "heads in":
        shape, chain = (n * m, width), (Transpose(), Split(1, (n, m)))
    elif kind == "heads out":
        shape, chain = (width, n * m), (Transpose(), Split(0, (n, m)))
    elif kind == "rope":
        shape, chain = (n * m, width), (Transpose(), Split(1, (n, m)), Interleave(2))
    elif kind == "permute":
        shape, chain = (width, n, m), (Permute(draw(st.sampled_from(list(itertools.permutations(range(3)))))),)
    elif kind == "pad":
        shape, chain = (n, width), (Resize(0, n, n + draw(SMALL)), Transpose())
    else:
        shape, chain = (width, n, m), (Merge(1, (n, m)), Transpose())
    for _ in range(draw(st.integers(0, 2))):
        rank = len(ops.chain_shape(chain, shape))
        chain = (*chain, Expand(draw(st.integers(0, rank))))
    return shape, chain


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


@given(chains())
def test_inverse_of_forward_is_the_identity(case):
    shape, chain = case
    array = numbered(shape)
    there = ops.apply(chain, array)
    assert there.shape == ops.chain_shape(chain, shape)
    back = ops.apply(ops.inverse_chain(chain), there)
    assert back.shape == shape
    np.testing.assert_array_equal(back, array)


@st.composite
def halves(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Op, ...]]:
    """One of two parts that a fused tensor holds, interleaved or one after the other."""
    n, m, width = draw(SMALL), draw(SMALL), draw(SMALL)
    index = draw(st.integers(0, 1))
    if draw(st.booleans()):
        return (width, n, 2 * m), (Split(2, (m, 2)), Pick(3, index, 2), Expand(1))
    return (width, 2 * m, n), (Split(1, (2, m)), Pick(1, index, 2), Permute((0, 2, 1)), Expand(1))


@given(chains() | halves(), st.data())
def test_a_slice_of_the_output_needs_only_what_pull_says(case, data):
    shape, chain = case
    array = numbered(shape)
    expected = ops.apply(chain, array)
    box = tuple(
        data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda b: b[0] < b[1]))
        if n > 1
        else (0, 1)
        for n in expected.shape
    )
    wanted = ops.pull_chain(chain, box, shape)
    result = ops.forward_chain(chain, array[slices(wanted)], box, shape)
    assert result.shape == box_shape(box)
    np.testing.assert_array_equal(result, expected[slices(box)])


@given(chains() | halves())
def test_chains_survive_json(case):
    _, chain = case
    adapter = TypeAdapter(ops.Ops)
    assert adapter.validate_json(adapter.dump_json(chain)) == chain


def test_interleave_makes_pairs_of_halves():
    np.testing.assert_array_equal(ops.apply((Interleave(0),), np.array([0, 1, 2, 10, 11, 12])), [0, 10, 1, 11, 2, 12])


def test_split_puts_the_heads_first():
    array = np.arange(6).reshape(6, 1)
    np.testing.assert_array_equal(ops.apply((Transpose(), Split(1, (2, 3))), array), [[[0, 1, 2], [3, 4, 5]]])


@pytest.mark.parametrize(
    ("root", "exact"), [(1, True), (4, True), (16, True), (64, True), (256, True), (2, False), (128, False)]
)
def test_scale_is_exact_for_powers_of_four_only(root, exact):
    values = np.random.default_rng(0).standard_normal(4096).astype(ml_dtypes.bfloat16)
    scale = Scale(root)
    assert scale.exact("bfloat16") == exact
    back = ops.apply((scale, scale.inverse()), values)
    assert (back.view(np.uint16) == values.view(np.uint16)).all() == exact


def test_pick_takes_every_other_or_one_half():
    fused = np.array([[0, 10, 1, 11, 2, 12]])
    for index, expected in enumerate(([[0, 1, 2]], [[10, 11, 12]])):
        np.testing.assert_array_equal(ops.apply((Split(1, (3, 2)), Pick(2, index, 2)), fused), expected)
        concatenated = fused[:, [0, 2, 4, 1, 3, 5]]
        np.testing.assert_array_equal(ops.apply((Split(1, (2, 3)), Pick(1, index, 2)), concatenated), expected)


def test_resize_adds_zeros_and_cuts():
    rows = np.arange(1, 7).reshape(3, 2)
    np.testing.assert_array_equal(ops.apply((Resize(0, 3, 5),), rows), [*rows, [0, 0], [0, 0]])
    np.testing.assert_array_equal(ops.apply((Resize(0, 3, 2),), rows), rows[:2])
    assert Resize(0, 3, 5).exact("bfloat16")
    assert not Resize(0, 3, 2).exact("bfloat16")
    assert Resize(0, 3, 2).inverse() == Resize(0, 2, 3)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_shift_adds_one_in_float32_and_rounds_once(dtype):
    values = np.random.default_rng(2).normal(0, 0.2, 1000).astype(dtype)
    shifted = ops.apply((Shift(1),), values)
    assert shifted.dtype == dtype
    np.testing.assert_array_equal(shifted, (values.astype(np.float32) + np.float32(1)).astype(dtype))
    back = ops.apply((Shift(1).inverse(),), shifted)
    np.testing.assert_array_equal(back, (shifted.astype(np.float32) - np.float32(1)).astype(dtype))
    assert (back != values).any()
    assert not Shift(1).exact("float32")


def test_the_scale_of_gemma_3s_embedding_is_rounded_first():
    """sqrt(2560) is 50.596; the nearest bfloat16 is 50.5."""
    one = np.ones((1, 1), np.float32)
    assert ops.apply((ScaleEmbedding(2560, "bfloat16"),), one) == 50.5
    assert ops.apply((ScaleEmbedding(2560),), one) == np.float32(2560**0.5)


@pytest.mark.parametrize(("hidden", "exact"), [(1024, True), (4096, True), (2560, False), (2304, False)])
def test_a_scaled_embedding_comes_back_where_the_root_is_a_power_of_two(hidden, exact):
    values = np.random.default_rng(3).standard_normal((512, 16)).astype(ml_dtypes.bfloat16)
    scale = ScaleEmbedding(hidden, "bfloat16")
    assert scale.exact("bfloat16") == exact
    back = ops.apply((scale, scale.inverse()), values)
    assert (back.view(np.uint16) == values.view(np.uint16)).all() == exact
    wide = values.astype(np.float32)  # at float32 the bfloat16 source comes back all the same
    back = ops.apply((scale, scale.inverse()), wide).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(back.view(np.uint16), values.view(np.uint16))


def test_scale_rounds_once_from_float32():
    values = np.random.default_rng(1).standard_normal(1000).astype(ml_dtypes.bfloat16)
    expected = (values.astype(np.float32) * np.float32(1 / np.sqrt(128))).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(ops.apply((Scale(128),), values).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Transpose(), (2, 3, 4)),
        (Split(0, (2, 3)), (7,)),
        (Merge(0, (2, 3)), (3, 2)),
        (Interleave(0), (3,)),
        (Squeeze(0), (2, 3)),
        (Permute((0, 2, 1)), (2, 3)),
        (Pick(1, 0, 2), (2, 3)),
        (Resize(0, 3, 5), (2, 3)),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(op, shape):
    with pytest.raises(BadInput):
        op.shape(shape)
