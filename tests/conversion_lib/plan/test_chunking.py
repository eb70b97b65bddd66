"""Chunks: within the limit, aligned for sharded readers, one layer where a layer is large."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion_lib.plan.chunking import ABOUT, SMALLEST, chunk_shape

MIB = 1 << 20


@given(
    shape=st.lists(st.integers(1, 300_000), min_size=1, max_size=4).map(tuple),
    width=st.sampled_from([2, 4]),
    limit=st.sampled_from([8 * MIB, 64 * MIB, 256 * MIB]),
    data=st.data(),
)
def test_a_chunk_never_passes_the_limit(shape, width, limit, data):
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    chunk = chunk_shape(shape, width, limit, axis)
    assert len(chunk) == len(shape)
    assert all(1 <= part <= extent for part, extent in zip(chunk, shape, strict=True))
    assert math.prod(chunk) * width <= limit


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((7168, 61), 1, (7168, 61)),  # small: one chunk
        ((7168, 3, 18432), 1, (448, 1, 18432)),  # a layer's sixteenth
        ((4096, 12, 12288), 1, (256, 1, 12288)),
        ((256, 58, 7168, 2048), 1, (2, 1, 7168, 2048)),  # two experts: sixteenths divided further
        ((7168, 58, 1536), 1, (448, 5, 1536)),  # as many layers as make a sixteenth large enough
        ((7168, 58, 256), 1, (448, 29, 256)),
        ((4096, 12, 1024), 1, (256, 12, 1024)),  # MaxText's own chunk: all layers
        ((2048, 13, 768), 1, (512, 13, 768)),  # sixteenths would be too small: quarters
        ((129280, 7168), None, (4040, 7168)),
        ((151936, 1024), None, (9496, 1024)),
        ((), None, ()),
    ],
)
def test_chunks_of_real_arrays(shape, axis, expected):
    assert chunk_shape(shape, 2, 64 * MIB, axis) == expected


@given(st.integers(1, 64), st.integers(1, 70), st.integers(1, 4096))
def test_sixteen_shards_are_whole_chunks(sixteenths, layers, columns):
    shape = (16 * sixteenths, layers, columns)
    chunk = chunk_shape(shape, 2, 64 * MIB, 1)
    if math.prod(shape) * 2 // 16 >= SMALLEST:
        assert (shape[0] // 16) % chunk[0] == 0
        assert math.prod(chunk) * 2 >= ABOUT * SMALLEST


@given(st.integers(1, 300), st.integers(1, 12))
def test_layers_pad_little_or_are_few(layers, columns):
    chunk = chunk_shape((1024, layers, columns * 256), 2, 64 * MIB, 1)
    padding = -layers % chunk[1]
    assert padding <= 0.03 * layers or padding < chunk[1] <= 2 * math.ceil(SMALLEST / (64 * columns * 256 * 2))
