"""Pieces and bands: they tile the arrays, keep to their limits, and read what they need."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.core.boxes import box_shape, slices
from conversion_lib.plan.chunking import chunk_shape
from conversion_lib.plan.ops import Expand, Interleave, Permute, Pick, Split, Transpose
from conversion_lib.plan.pieces import Piece, bands, cut, piece_shape, whole_arrays
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice

MIB = 1 << 20


def stacked(rows: int, columns: int, layers: int, chunk: tuple[int, int, int]) -> ArrayPlan:
    """(rows, columns) of each layer, transposed and stacked on axis 1."""
    sources = tuple(SourceSlice(f"t{i}", (rows, columns), (0, i, 0)) for i in range(layers))
    return ArrayPlan("a", (columns, layers, rows), "bfloat16", chunk, (Transpose(), Expand(1)), sources)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5)),
    st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 40)),
    st.integers(2, 4000),
)
def test_pieces_tile_the_array_in_whole_chunks(sizes, chunk, limit):
    rows, columns, layers = sizes
    chunk = tuple(min(c, n) for c, n in zip(chunk, (columns, layers, rows), strict=True))
    array = stacked(rows, columns, layers, chunk)
    count = np.zeros(array.shape, int)
    plan = Plan(kind="maxtext", arrays=(array,), identity={})
    for piece in cut(plan, whole_arrays(plan), limit):
        count[slices(piece.box)] += 1
        for (start, stop), step, extent in zip(piece.box, chunk, array.shape, strict=True):
            assert start % step == 0
            assert stop % step == 0 or stop == extent
        one_chunk = math.prod(chunk) * 2
        assert math.prod(box_shape(piece.box)) * 2 <= max(limit, one_chunk)
    assert (count == 1).all()


@settings(deadline=None)
@given(st.integers(1, 5), st.sampled_from([2, 4, 6]), st.integers(1, 20), st.integers(1, 4), st.integers(8, 400))
def test_bands_fill_a_piece_once(heads, head_dim, width, layers, limit):
    """For a chain with heads and RoPE, at band sizes from a few bytes up."""
    shape = (heads * head_dim, width)
    ops = (Transpose(), Split(1, (heads, head_dim)), Interleave(2), Expand(1))
    whole = (width, layers, heads, head_dim)
    sources = tuple(SourceSlice(f"t{i}", shape, (0, i, 0, 0)) for i in range(layers))
    array = ArrayPlan("a", whole, "bfloat16", whole, ops, sources)
    count = np.zeros(whole, int)
    for band in bands(array, Piece(0, tuple((0, n) for n in whole)), limit):
        count[slices(band.write)] += 1
    assert (count == 1).all()


def test_a_transposed_layer_is_read_whole_where_the_limit_allows():
    """DeepSeek's dense MLP: a chunk is 448 columns of each of 18432 rows; a piece is the whole tensor."""
    array = stacked(18432, 7168, 3, chunk_shape((7168, 3, 18432), 2, 64 * MIB, 1))
    assert array.chunk_shape == (448, 1, 18432)
    assert piece_shape(array, 256 * MIB) == (7168, 1, 18432)
    assert piece_shape(array, 70 * MIB) == (1792, 1, 18432)
    assert piece_shape(array, 1) == (448, 1, 18432)


def test_bands_are_contiguous_rows_of_the_source():
    array = stacked(18432, 7168, 3, (448, 1, 18432))
    for band in bands(array, Piece(0, ((0, 7168), (1, 2), (0, 18432))), 2 * MIB):
        assert band.source.tensor == "t1"
        assert band.read[1] == (0, 7168)
        assert box_shape(band.read)[0] * 7168 * 2 <= 2 * MIB


@pytest.mark.parametrize(
    ("shape", "ops"),
    [
        ((8, 2880, 5760), (Split(2, (2880, 2)), Pick(3, 0, 2), Expand(1))),
        ((8, 5760, 2880), (Split(1, (2, 2880)), Pick(1, 0, 2), Permute((0, 2, 1)), Expand(1))),
    ],
)
def test_bands_of_experts_in_one_tensor_are_cut_within_an_expert(shape, ops):
    whole = (8, 1, 2880, 2880)
    array = ArrayPlan("a", whole, "bfloat16", whole, ops, (SourceSlice("t", shape, (0, 0, 0, 0)),))
    count = np.zeros(whole, np.uint8)
    for band in bands(array, Piece(0, tuple((0, n) for n in whole)), 2 * MIB):
        assert math.prod(box_shape(band.read)) * 2 <= 4 * MIB
        count[slices(band.write)] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("piece_limit", [1, 10**9])
def test_a_scalar_is_one_piece(piece_limit):
    array = ArrayPlan("step", (), "float32", (), (), (SourceSlice("t", (), ()),))
    plan = Plan(kind="maxtext", arrays=(array,), identity={})
    assert cut(plan, whole_arrays(plan), piece_limit) == [Piece(0, ())]
    assert [band.read for band in bands(array, Piece(0, ()), 2 * MIB)] == [()]
