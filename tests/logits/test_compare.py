"""Distances between logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from conversion_lib.errors import BadInput
from conversion_lib.logits.compare import (
    LayerDifference,
    compare_layer,
    compare_logits,
    first_departing,
    kl_per_token,
    log_softmax,
    top_tokens,
)

LOGITS = arrays.arrays(np.float32, (3, 7), elements=st.floats(-50, 50, width=32))


def test_a_value_worked_out_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4): ln(2/3) / 2 + ln(2) / 2 = ln(4/3) / 2
    p, q = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    assert math.isclose(kl_per_token(p, q)[0], math.log(4 / 3) / 2, rel_tol=1e-12)


@given(LOGITS)
def test_equal_logits_are_at_no_distance(logits):
    assert kl_per_token(logits, logits).tolist() == [0, 0, 0]


@given(LOGITS, LOGITS)
def test_kl_is_never_negative(a, b):
    assert (kl_per_token(a, b) >= 0).all()


@given(LOGITS, st.floats(-100, 100))
def test_a_constant_added_to_a_row_changes_nothing(logits, constant):
    moved = logits.astype(np.float64) + constant
    assert kl_per_token(logits, moved).max() < 1e-12


@given(LOGITS)
def test_probabilities_sum_to_one(logits):
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_far(bad):
    good = np.zeros((70, 5), np.float32)
    broken = good.copy()
    broken[69, 2] = bad
    comparison = compare_logits([good], [broken])
    assert comparison.max_kl == comparison.max_abs_diff == math.inf
    assert np.isfinite(comparison.kl[:69]).all()


def test_shares_of_agreement():
    wanted = np.arange(20, dtype=np.float32)[None].repeat(2, 0)
    found = wanted.copy()
    found[1] = found[1][::-1]
    comparison = compare_logits([wanted], [found])
    assert (comparison.top1, comparison.top10, comparison.max_abs_diff) == (0.5, 0.5, 19)
    assert comparison.kl[0] == 0
    assert comparison.mean_kl == comparison.kl[1] / 2


def test_shapes_must_agree():
    with pytest.raises(BadInput, match=r"prompt 0: .*\(2, 5\).*\(2, 4\)"):
        compare_logits([np.zeros((2, 5))], [np.zeros((2, 4))])


def test_top_tokens_in_order():
    assert top_tokens(np.array([[1.0, 9, 3, 9, 2]]), 3).tolist() == [[1, 3, 2]]
    assert top_tokens(np.array([[1.0, 2]]), 10).tolist() == [[1, 0]]


def test_layers_are_measured_by_their_worst_token():
    reference = np.array([[3.0, 4.0], [100.0, 0.0]], np.float32)
    candidate = np.array([[3.0, 4.5], [100.0, 0.0]], np.float32)
    entry = compare_layer(2, reference, candidate)
    assert (entry.layer, entry.max_abs_diff, entry.relative) == (2, 0.5, 0.1)
    zero = np.zeros((1, 2), np.float32)
    assert compare_layer(0, zero, zero).relative == 0
    assert compare_layer(0, zero, zero + 1).relative == math.inf


def test_the_first_layer_that_departs():
    def entry(layer, relative):
        return LayerDifference(layer=layer, max_abs_diff=0, relative=relative)

    layers = [entry(-1, 0), entry(0, 1e-6), entry(1, math.nan), entry(2, 1)]
    assert first_departing(layers, 1e-4) == 1
    assert first_departing(layers[:2], 1e-4) is None
    assert LayerDifference.model_validate_json(layers[2].model_dump_json()).layer == 1
