"""Ops by property: the inverse undoes the forward, shapes agree, and any slice equals that slice of the whole."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from conversion_lib import ops
from conversion_lib.boxes import box_shape, slices
from conversion_lib.errors import BadInput
from conversion_lib.ops import Expand, Interleave, Merge, Op, Scale, Split, Squeeze, Transpose

SMALL = st.integers(1, 6)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Op, ...]]:
    """A chain like the tables have, with its input shape."""
    n, m, width = draw(SMALL), draw(SMALL) * 2, draw(SMALL)
    kind = draw(st.sampled_from(["linear", "heads in", "heads out", "rope", "vector", "merge"]))
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


@given(chains(), st.data())
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


@given(chains())
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
    ],
)
def test_a_shape_that_does_not_fit_is_refused(op, shape):
    with pytest.raises(BadInput):
        op.shape(shape)
