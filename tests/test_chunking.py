"""Chunks: within the limit, aligned for sharded readers, one layer where a layer is large."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion_lib.chunking import SMALLEST, chunk_shape

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
        ((256, 58, 7168, 2048), 1, (2, 1, 7168, 2048)),  # two experts: sixteenths divided further
        ((7168, 58, 1536), 1, (3584, 1, 1536)),  # a sixteenth would be under 8 MiB
        ((7168, 58, 256), 1, (7168, 3, 256)),  # a layer would be under 8 MiB
        ((129280, 7168), None, (4040, 7168)),
        ((151936, 1024), None, (9496, 1024)),
        ((), None, ()),
    ],
)
def test_chunks_of_real_arrays(shape, axis, expected):
    assert chunk_shape(shape, 2, 64 * MIB, axis) == expected


@given(st.integers(1, 64), st.integers(1, 40), st.integers(1, 4096))
def test_sixteen_shards_are_whole_chunks(sixteenths, layers, columns):
    shape = (16 * sixteenths, layers, columns)
    chunk = chunk_shape(shape, 2, 64 * MIB, 1)
    layer = math.prod(shape) // layers * 2
    if layer // 16 >= SMALLEST:
        assert (shape[0] // 16) % chunk[0] == 0
