"""Scores, gap-mass selection and importance weights, against the worked numbers and by property.

W1, W2, W9 are worked examples computed by hand from the papers' formulas.
"""

from collections.abc import Sequence
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.algorithms.gaps import (
    advantage,
    importance_weights,
    mean_absolute_gap,
    mean_positive_gap,
    select_by_mass,
)
from megadistill.config.distillation import AdvantageConfig, ImportanceConfig
from megadistill.types import FloatArray
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


RATIOS = [0.1, 0.4, 0.9, 1, 1.7, 3, 9]


def weights_of(
    ratios: Sequence[float], kind: str = "mask", **settings: float
) -> tuple[FloatArray, FloatArray]:
    """Weights and counted tokens of a response with these ratios of trainer to rollout engine."""
    config = ImportanceConfig.model_validate({"kind": kind, **settings})
    student_R = float32(np.log(ratios) - 2.0)
    return importance_weights(student_R, float32([-2.0] * len(ratios)), config)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mask", [0, 0, 0.9, 1, 1.7, 0, 0]),
        ("icepop", [0, 0, 0.9, 1, 1.7, 3, 0]),
        ("truncate", [0.1, 0.4, 0.9, 1, 1.7, 2, 2]),
        ("mis", [0, 0, 0.9, 1, 1.7, 0, 0]),
        ("sequence", [0] * 7),
        ("none", [1] * 7),
    ],
)
def test_importance_weights_are_those_of_the_table(kind: str, expected: list[float]) -> None:
    """W9, and the other rows of ALGORITHMS section 4, at their default bounds."""
    weights_R, _ = weights_of(RATIOS, kind)
    np.testing.assert_allclose(weights_R, expected, atol=1e-6)
    assert weights_R.dtype == np.float32


def test_only_mis_takes_masked_tokens_out_of_the_average() -> None:
    assert weights_of(RATIOS, "mis")[1].tolist() == [0, 0, 1, 1, 1, 0, 0]
    for kind in ("mask", "icepop", "truncate", "sequence", "none"):
        assert weights_of(RATIOS, kind)[1].tolist() == [1] * 7


def test_mis_drops_a_response_with_one_hopeless_token() -> None:
    for array in weights_of([1.0, 0.99e-4, 1.0], "mis"):
        assert array.tolist() == [0, 0, 0]
    assert weights_of([1.0, 1.01e-4, 1.0], "mis")[1].tolist() == [1, 0, 1]


def test_a_response_is_judged_by_its_geometric_mean_and_keeps_its_ratios() -> None:
    inside = [1.01, 0.99, 1.001]  # geometric mean 1.000298
    np.testing.assert_allclose(weights_of(inside, "sequence")[0], inside, rtol=1e-6)
    assert weights_of([1.01, 0.99, 1.02], "sequence")[0].tolist() == [0, 0, 0]  # 1.006583


def test_the_bounds_themselves_are_inside() -> None:
    bounds_R = float32(np.log([0.5, 2.0]))
    low, high = np.exp(bounds_R.astype(np.float64))
    config = ImportanceConfig(low=float(low), high=float(high))
    weights_R, _ = importance_weights(bounds_R, float32([0, 0]), config)
    np.testing.assert_allclose(weights_R, [0.5, 2.0], atol=1e-6)


def test_equal_policies_have_weight_one() -> None:
    logprobs_R = float32([-0.1, -30.0, 0.0])
    for kind in ("mask", "icepop", "truncate", "mis", "sequence", "none"):
        config = ImportanceConfig.model_validate({"kind": kind})
        assert importance_weights(logprobs_R, logprobs_R, config)[0].tolist() == [1.0, 1.0, 1.0]


def test_extreme_differences_are_masked_without_overflow() -> None:
    student_R = float32([0.0, -1e30, -1000.0, 0.0])
    rollout_R = float32([-1e30, 0.0, 0.0, -1000.0])
    weights_R, _ = importance_weights(student_R, rollout_R, ImportanceConfig())
    assert weights_R.dtype == np.float32
    assert weights_R.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_a_floor_bounds_the_advantage_as_the_worked_example_says() -> None:
    """W8: lambda 0.3 is a floor of -0.847298."""
    found_R = advantage(float32([0.5, -0.2, -3.0]), AdvantageConfig(floor=0.3))
    np.testing.assert_allclose(found_R, [0.5, -0.2, -0.847298], atol=1e-6)


def test_a_reference_extrapolates_from_it() -> None:
    """G-OPD: lambda log(T / ref) - log(student / ref), here with lambda 1.25."""
    student, teacher, reference = float32([-1.0, -2]), float32([-0.5, -3]), float32([-1.5, -1])
    found_R = advantage(
        teacher - student,
        AdvantageConfig(reference="base", scale=1.25),
        reference_gap_R=reference - student,
    )
    expected = 1.25 * (teacher - reference) - (student - reference)
    np.testing.assert_allclose(found_R, expected, atol=1e-6)
    plain_R = advantage(teacher - student, AdvantageConfig(), reference_gap_R=reference - student)
    np.testing.assert_array_equal(plain_R, teacher - student)


def test_a_baseline_centres_the_advantage() -> None:
    """vOPD on W4's pair: E over the student's tokens of A is 0, for the baseline is E of the gap."""
    student, teacher = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    gap_R = float32(np.log(teacher / student))
    expected_gap_R = float32([(student * np.log(teacher / student)).sum()] * 3)
    assert expected_gap_R[0] == pytest.approx(-0.223805, abs=1e-6)
    shaped_R = advantage(gap_R, AdvantageConfig(baseline=True), expected_gap_R=expected_gap_R)
    assert (student * shaped_R).sum() == pytest.approx(0, abs=1e-6)


def test_a_scale_without_a_reference_scales_the_gap() -> None:
    assert advantage(float32([1.0, -2.0]), AdvantageConfig(scale=1.5)).tolist() == [1.5, -3.0]
