"""Distances between logits."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from conversion_lib.errors import BadInput
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import (
    HISTOGRAM_EDGES,
    BlockDifference,
    LayerDifference,
    Relative,
    Spot,
    compare_layer,
    compare_logits,
    first_departing,
    kl_per_token,
    log_softmax,
    not_finite,
    relative_difference,
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


def test_ranks_and_sets_of_the_most_likely():
    wanted = np.arange(20, dtype=np.float32)[None]
    swapped = wanted.copy()
    swapped[0, [19, 18]] = swapped[0, [18, 19]]
    comparison = compare_logits([wanted], [swapped])
    assert (comparison.top1, comparison.top10, comparison.jaccard, comparison.rank_agreement) == (0, 1, 1, 0.8)
    fewer = wanted.copy()
    fewer[0, 10] = -5  # the tenth leaves the ten, another comes in
    comparison = compare_logits([wanted], [fewer])
    assert (comparison.top1, comparison.top10) == (1, 0.9)
    assert math.isclose(comparison.jaccard, 9 / 11)
    assert math.isclose(comparison.rank_agreement, 0.9)


def test_every_finite_difference_is_in_the_histogram():
    wanted, found = np.zeros((1, 5), np.float32), np.array([[0, 1e-12, 1e-3, 5, np.nan]], np.float32)
    histogram = compare_logits([wanted], [found]).histogram
    assert histogram.sum() == 4
    assert histogram[0] == 2
    bins = np.searchsorted(HISTOGRAM_EDGES, [np.float32(1e-3), 5], side="right") - 1
    assert histogram[bins].tolist() == [1, 1]


def test_blocks_are_measured_by_the_length_of_their_tokens():
    reference = np.array([[3.0, 4.0], [100.0, 0.0]], np.float32)
    candidate = np.array([[3.0, 4.5], [100.0, 0.0]], np.float32)
    assert relative_difference((reference, candidate)) == Relative(mean=0.05, largest=0.1)
    zero = np.zeros((1, 2), np.float32)
    assert relative_difference((zero, zero)).largest == 0
    assert relative_difference((zero, zero + 1)).largest == math.inf
    assert math.isnan(relative_difference((reference, candidate * np.float32(np.nan))).mean)


def test_layers_are_compared_block_by_block_in_the_order_of_computing():
    one = np.ones((2, 2), np.float32)
    wanted = {blocks.STREAM: one, blocks.MLP: one, blocks.ATTENTION: one}
    found = {blocks.STREAM: one + 0.5, blocks.ATTENTION: one, blocks.MLP: one * 2, blocks.ROUTER: one}
    entry = compare_layer(2, wanted, found, defaultdict(lambda: Relative(mean=1e-4, largest=1e-3)))
    assert list(entry.blocks) == [blocks.ATTENTION, blocks.MLP, blocks.STREAM]
    assert (entry.layer, entry.max_abs_diff, entry.relative) == (2, 0.5, 0.5)
    assert first_departing([entry]) == Spot(layer=2, block=blocks.MLP)
    assert LayerDifference.model_validate_json(entry.model_dump_json()) == entry


def test_the_first_block_that_departs():
    def entry(layer, mean, largest, allowed=1e-4):
        off, limits = Relative(mean=mean, largest=largest), Relative(mean=allowed, largest=10 * allowed)
        found = {blocks.STREAM: BlockDifference(relative=off, allowed=limits)}
        return LayerDifference(layer=layer, max_abs_diff=0, relative=largest, blocks=found)

    right = [entry(-1, 0, 0), entry(0, 1e-3, 1e-3, allowed=1e-2), entry(1, 1e-5, 9e-4)]
    assert first_departing(right) is None
    for wrong in (entry(2, math.nan, math.nan), entry(2, 2e-4, 2e-4), entry(2, 1e-5, 2e-3)):
        assert first_departing([*right, wrong, entry(3, 1, 1)]) == Spot(layer=2, block=blocks.STREAM)


def test_where_values_stop_being_finite():
    good, bad = np.ones((2, 2), np.float32), np.array([[1, np.inf], [1, 1]], np.float32)
    states = {blocks.STREAM: bad, blocks.ATTENTION: good, blocks.EXPERTS: bad}
    assert str(not_finite(3, states)) == "layer 3, experts"
    assert not_finite(3, {blocks.STREAM: good}) is None
