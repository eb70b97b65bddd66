"""What a round trip keeps and loses: the committed table, and every op against its inverse."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.core.copying import cast
from conversion_lib.plan import ops
from conversion_lib.plan.value_ops import Resize, Scale, ScaleEmbedding, Shift
from tests.support.round_trip import PAGE, page, there_and_back

ROOTS = st.integers(1, 4096)
SEEDS = st.integers(0, 1 << 32)
unhurried = settings(deadline=None)


def values_of(seed: int, dtype: str) -> np.ndarray:
    """Values of all magnitudes from 2**-20 to 2**20, of both signs, and zero."""
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.uniform(-1, 1, 256), rng.integers(-20, 21, 256)).astype(np.float32)
    values[0] = 0
    return cast(values, dtype)


def test_the_table_is_what_the_code_does():
    text = PAGE.read_text()
    assert page(text) == text
    assert text.count("\n| ") > 50


@unhurried
@given(SEEDS, ROOTS)
def test_bfloat16_comes_back_from_a_float32_checkpoint(seed: int, root: int):
    """float32 has room for what scaling a bfloat16 value makes of it."""
    narrow = values_of(seed, "bfloat16")
    for op in (Scale(root), ScaleEmbedding(root), ScaleEmbedding(root, "bfloat16")):
        back = there_and_back(narrow, (op,), "float32")
        np.testing.assert_array_equal(back.view(np.uint16), narrow.view(np.uint16))


@unhurried
@given(SEEDS, ROOTS, st.sampled_from(["bfloat16", "float32"]))
def test_what_says_that_it_is_exact_is(seed: int, root: int, dtype: str):
    values = values_of(seed, dtype)
    for op in (Scale(root), ScaleEmbedding(root), ScaleEmbedding(root, "bfloat16")):
        if op.exact(dtype):
            np.testing.assert_array_equal(there_and_back(values, (op,), dtype), values)


@unhurried
@given(SEEDS, ROOTS)
def test_a_scale_loses_a_bit_at_most(seed: int, root: int):
    narrow = values_of(seed, "bfloat16")
    before, after = (cast(of, "float32") for of in (narrow, there_and_back(narrow, (Scale(root),), "bfloat16")))
    assert np.all(np.abs(after - before) <= 2**-7 * np.abs(before))


def test_a_norm_of_bfloat16_comes_back():
    """Its eight bits, and one added to them, fit float32's twenty-four from 2**-15 on."""
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    magnitude = np.abs(every.astype(np.float32))
    narrow = every[(magnitude >= 2**-15) & (magnitude < 2**7)]
    np.testing.assert_array_equal(there_and_back(narrow, (Shift(1),), "float32"), narrow)


@unhurried
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
def test_rows_come_back_where_none_were_cut(before: int, after: int, columns: int):
    rows = np.arange(1, before * columns + 1, dtype=np.float32).reshape(before, columns)
    resize = Resize(0, before, after)
    back = there_and_back(rows, (resize,), "float32")
    kept = min(before, after)
    np.testing.assert_array_equal(back[:kept], rows[:kept])
    assert back.shape == rows.shape and not back[kept:].any()
    assert resize.exact("float32") == (kept == before)
    assert ops.inverse_chain((resize,))[0].inverse() == resize
