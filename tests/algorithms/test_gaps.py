"""Scores, gap-mass selection and importance weights, against the worked numbers and by property.

W1, W2, W9 are worked examples computed by hand from the papers' formulas.
"""

from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.algorithms.gaps import (
    importance_weights,
    mean_absolute_gap,
    mean_positive_gap,
    select_by_mass,
)
from tests.tiny import float32

W1_GAP = float32([0.2, -1.5, 0.0, -2.0])
W2_SCORES = [0.925, 0.10, 0.45, 0.05, 0.30, 0.175]

scores_lists = st.lists(st.integers(0, 1000), min_size=1, max_size=40).map(
    lambda values: [value / 64 for value in values]  # exact in binary, so sums have no rounding
)
masses = st.integers(1, 64).map(lambda value: value / 64)


def test_the_general_score_is_the_mean_absolute_gap() -> None:
    assert mean_absolute_gap(W1_GAP) == pytest.approx(0.925, abs=1e-6)


def test_the_domain_score_is_the_mean_positive_gap() -> None:
    assert mean_positive_gap(W1_GAP) == pytest.approx(0.05, abs=1e-6)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=50))
def test_the_general_score_is_the_domain_score_of_the_gap_and_of_its_negative(
    gap: list[float],
) -> None:
    gap_R = float32(gap)
    both = mean_positive_gap(gap_R) + mean_positive_gap(-gap_R)
    assert mean_absolute_gap(gap_R) == pytest.approx(both, abs=1e-9)


def test_scores_are_summed_in_double_precision() -> None:
    gap_R = np.full(100_000, 0.1, dtype=np.float32)
    assert mean_absolute_gap(gap_R) == pytest.approx(float(np.float32(0.1)), rel=1e-12)
    assert mean_positive_gap(gap_R) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize(("mass", "kept"), [(0.8, [0, 2, 4]), (0.6, [0, 2])])
def test_selection_keeps_the_fewest_samples_that_hold_the_mass(
    mass: float, kept: list[int]
) -> None:
    assert select_by_mass(W2_SCORES, mass) == kept


def test_ten_equal_scores_keep_eight_in_spite_of_rounding() -> None:
    assert select_by_mass([0.1] * 10, 0.8) == list(range(8))
    # The reason for the tolerance: the plain sum of eight is below 0.8.
    assert np.cumsum([0.1] * 10)[7] < 0.8


def test_all_of_the_mass_leaves_out_what_has_none() -> None:
    assert select_by_mass([5, 1, 0, 0], 1.0) == [0, 1]
    assert select_by_mass([5, 1, 1, 1], 1.0) == [0, 1, 2, 3]


def test_ties_go_to_the_lower_index() -> None:
    assert select_by_mass([0.2, 0.2, 0.2, 0.2], 0.5) == [0, 1]
    assert select_by_mass([0.1, 0.4, 0.1, 0.4], 0.9) == [1, 3, 0]


@given(st.integers(1, 30), masses)
def test_scores_without_any_mass_keep_everything(count: int, mass: float) -> None:
    assert select_by_mass([0.0] * count, mass) == list(range(count))


@given(scores_lists, masses)
def test_the_kept_samples_are_the_smallest_sufficient_prefix(
    scores: list[float], mass: float
) -> None:
    kept = select_by_mass(scores, mass)
    needed = mass * sum(scores)
    if not sum(scores):
        return
    assert sum(scores[index] for index in kept) >= needed
    assert sum(scores[index] for index in kept[:-1]) < needed


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), masses)
def test_no_smaller_set_of_any_samples_holds_the_mass(scores: list[int], mass: float) -> None:
    num_kept = len(select_by_mass([float(score) for score in scores], mass))
    if not sum(scores):
        return
    smaller = combinations(scores, num_kept - 1)
    assert all(sum(group) < mass * sum(scores) for group in smaller)


@given(scores_lists, masses)
def test_the_order_is_by_score_and_then_by_index(scores: list[float], mass: float) -> None:
    kept = select_by_mass(scores, mass)
    assert kept == sorted(kept, key=lambda index: (-scores[index], index))
    assert len(set(kept)) == len(kept)


@given(st.sets(st.integers(1, 1000), min_size=1, max_size=30), masses, st.randoms())
def test_permuting_distinct_scores_permutes_the_selection(
    values: set[int], mass: float, random: Random
) -> None:
    scores = [value / 64 for value in values]
    order = list(range(len(scores)))
    random.shuffle(order)
    kept = select_by_mass([scores[index] for index in order], mass)
    assert [order[place] for place in kept] == select_by_mass(scores, mass)


@given(scores_lists, masses, st.integers(-8, 8))
def test_the_unit_of_the_scores_does_not_matter(
    scores: list[float], mass: float, exponent: int
) -> None:
    scaled = [score * 2.0**exponent for score in scores]
    assert select_by_mass(scaled, mass) == select_by_mass(scores, mass)


@given(scores_lists, masses, masses)
def test_more_mass_never_keeps_less(scores: list[float], first: float, second: float) -> None:
    less, more = sorted((first, second))
    assert set(select_by_mass(scores, less)) <= set(select_by_mass(scores, more))


def test_importance_weights_mask_outside_the_bounds() -> None:
    ratio = [0.1, 0.4, 0.9, 1, 1.7, 3, 9]
    student_R = float32(np.log(ratio) - 2.0)
    weights_R = importance_weights(student_R, float32([-2.0] * 7), 0.5, 2.0)
    np.testing.assert_allclose(weights_R, [0, 0, 0.9, 1, 1.7, 0, 0], atol=1e-6)


def test_importance_weights_are_neither_clamped_nor_one_sided() -> None:
    student_R = float32(np.log([0.1, 0.4, 0.9, 1, 1.7, 3, 9]))
    ours = importance_weights(student_R, float32([0.0] * 7), 0.5, 2.0)
    truncated = [0.1, 0.4, 0.9, 1, 1.7, 2, 2]
    loosely_masked = [0, 0, 0.9, 1, 1.7, 3, 0]
    assert np.abs(ours - truncated).max() > 0.05
    assert np.abs(ours - loosely_masked).max() > 0.05


def test_the_bounds_themselves_are_inside() -> None:
    bounds_R = float32(np.log([0.5, 2.0]))
    ratio = np.exp(bounds_R.astype(np.float64))
    weights_R = importance_weights(bounds_R, float32([0, 0]), float(ratio[0]), float(ratio[1]))
    np.testing.assert_allclose(weights_R, [0.5, 2.0], atol=1e-6)


def test_equal_policies_have_weight_one() -> None:
    logprobs_R = float32([-0.1, -30.0, 0.0])
    assert importance_weights(logprobs_R, logprobs_R, 0.5, 2.0).tolist() == [1.0, 1.0, 1.0]


def test_extreme_differences_are_masked_without_overflow() -> None:
    student_R = float32([0.0, -1e30, -1000.0, 0.0])
    rollout_R = float32([-1e30, 0.0, 0.0, -1000.0])
    weights_R = importance_weights(student_R, rollout_R, 0.5, 2.0)
    assert weights_R.dtype == np.float32
    assert weights_R.tolist() == [0.0, 0.0, 0.0, 0.0]
