"""Copies between layouts and dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion_lib.core.copying import cast, copy_into


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float32, np.float64])
@given(rows=st.integers(1, 150), columns=st.integers(1, 70))
def test_a_transposed_copy_has_every_element_in_place(dtype, rows, columns):
    source = (np.arange(rows * columns) % 251).astype(dtype).reshape(rows, columns)
    out = np.zeros((columns, rows), dtype)
    copy_into(out, source.T)
    np.testing.assert_array_equal(out, source.T)


def test_a_copy_into_a_part_leaves_the_rest():
    out = np.zeros((4, 200), np.float32)
    copy_into(out[1:3, 50:150], np.ones((100, 2), np.float32).T)
    assert out.sum() == 200
    assert out[1:3, 50:150].all()


def test_a_scalar_is_copied():
    out = np.zeros((), np.float32)
    copy_into(out, np.array(3.0, np.float32))
    assert out == 3


def test_every_bfloat16_becomes_the_float32_it_stands_for():
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    ours, theirs = cast(values, "float32"), values.astype(np.float32)
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[finite], theirs[finite])
    assert (np.isnan(ours) == np.isnan(theirs)).all()


def test_float32_is_rounded_to_nearest_even():
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    assert cast(halfway, "bfloat16").view(np.uint16).tolist() == [0x3F80, 0x3F82, 0x3F81]
