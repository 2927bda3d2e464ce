"""Against published values, closed forms, and simulation."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import stats

from megadistill import stats as ours


def test_wilson_is_the_textbooks() -> None:
    # Newcombe (1998), Statistics in Medicine 17:857, Table I, 81 of 263.
    found = ours.wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert ours.wilson(0, 20).low == 0.0
    assert ours.wilson(20, 20).high == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("share", "items", "points"),
    [(0.6263, 198, 3.44), (0.3104, 30, 8.45), (0.763, 1000, 1.34), (0.8578, 1273, 0.98)],
)
def test_intervals_are_as_wide_as_the_binomial_says(
    share: float, items: int, points: float
) -> None:
    found = ours.wilson(round(share * items), items)
    assert (found.high - found.low) / 2 / 1.96 * 100 == pytest.approx(points, rel=0.06)


def test_mcnemar_is_the_exact_binomial_test_of_the_pairs_that_differ() -> None:
    # Agresti, Categorical Data Analysis: 86 against 150 opinions changed; chi-squared 17.36.
    first = np.array([1.0] * 150 + [0.0] * 86 + [1.0] * 794 + [0.0] * 570)
    second = np.array([0.0] * 150 + [1.0] * 86 + [1.0] * 794 + [0.0] * 570)
    assert ours.mcnemar(first, second) == pytest.approx(3.7e-5, rel=0.03)
    five = np.array([1.0] * 5 + [0.0])
    assert ours.mcnemar(five, np.array([0.0] * 5 + [1.0])) == pytest.approx(2 * 7 / 64)
    assert ours.mcnemar(first, first) == 1.0


def test_holm_is_the_step_down_procedure() -> None:
    assert ours.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ours.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert ours.holm([]) == []


def test_holm_leaves_tests_out_that_could_not_be_made() -> None:
    # As p.adjust of R does: a missing value counts neither as a test nor as a rank.
    found = ours.holm([0.01, math.nan, 0.04, 0.03, math.nan, 0.005])
    expected = [0.03, math.nan, 0.06, 0.06, math.nan, 0.02]
    assert found == pytest.approx(expected, nan_ok=True)


def test_items_that_weigh_nothing_are_in_no_mean_interval_or_test() -> None:
    values, others = np.array([[1.0, 0.0, 1.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 1.0, 1.0, 0.0]])
    weights = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    found = ours.interval(values, weights, seed=0, confidence=0.95)
    assert found == ours.wilson(2, 3)
    counted = ours.mcnemar(values[0, :3], others[0, :3])
    assert ours.compare(values, others, weights, seed=0) == counted
    mixed = np.array([[0.5, 0.25, 0.5, 0.0, 0.0]])
    assert ours.bootstrap(mixed, weights) == ours.bootstrap(mixed[:, :3])
    # A quarter of the resamples would have nothing but the item that weighs nothing.
    one = ours.bootstrap(np.array([[0.5, 0.0]]), np.array([1.0, 0.0]))
    assert (one.value, one.low, one.high) == (0.5, 0.5, 0.5)
    assert 0 < ours.paired_bootstrap(mixed, 0.5 * others, weights, draws=500) <= 1
    with pytest.raises(ValueError, match="found no weight above 0 among those of 5 items"):
        ours.bootstrap(values, 0 * weights)


def test_the_bootstrap_agrees_with_scipys_and_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).beta(2, 3, size=(1, 300))
    found = ours.bootstrap(values)
    error = values.std() / math.sqrt(300)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    theirs = stats.bootstrap(
        (values[0],), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.15 * error)


def test_weights_are_repetitions() -> None:
    values, weights = np.array([[1.0, 0.0, 0.5]]), np.array([3.0, 1.0, 1.0])
    assert ours.bootstrap(values, weights).value == pytest.approx(3.5 / 5)


def test_seeds_widen_the_interval_by_their_own_spread() -> None:
    random = np.random.default_rng(0)
    items = random.uniform(size=(1, 400))
    alike = ours.bootstrap(np.repeat(items, 4, axis=0), draws=4000)
    shifted = items + np.array([[-0.1], [0.1], [-0.1], [0.1]])
    spread = ours.bootstrap(shifted, draws=4000)
    half = (alike.high - alike.low) / 2
    expected = math.sqrt(half**2 + (1.96 * 0.1 / 2) ** 2)
    assert (spread.high - spread.low) / 2 == pytest.approx(expected, rel=0.05)
    assert half == pytest.approx(1.96 * items.std() / 20, rel=0.05)


def test_the_paired_bootstrap_sees_what_two_intervals_would_hide() -> None:
    random = np.random.default_rng(3)
    hard = random.uniform(size=(1, 200))
    better = hard + 0.02 + random.normal(0, 0.05, size=(1, 200))
    ones = np.ones(200)
    assert ours.paired_bootstrap(better, hard, ones) < 0.001
    low, high = ours.bootstrap(better).low, ours.bootstrap(hard).high
    assert low < high
    wilcoxon = ours.paired_bootstrap(hard, hard + random.normal(0, 0.05, size=(1, 200)), ones)
    assert wilcoxon > 0.05


def test_the_paired_bootstrap_holds_its_level() -> None:
    random = np.random.default_rng(5)
    ones = np.ones(80)
    found = [
        ours.paired_bootstrap(
            random.normal(size=(1, 80)), np.zeros((1, 80)), ones, seed=k, draws=400
        )
        for k in range(300)
    ]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_several_seeds_make_a_lucky_one_less_convincing() -> None:
    random = np.random.default_rng(7)
    base = random.uniform(size=(1, 100))
    lucky = base + 0.03
    several = base + np.array([[0.03], [-0.06], [0.06]])
    ones = np.ones(100)
    assert ours.paired_bootstrap(lucky, base, ones, draws=1000) < 0.01
    assert ours.paired_bootstrap(several, base, ones, draws=1000) > 0.05


def test_comparing_takes_mcnemar_where_answers_are_right_or_wrong() -> None:
    first, second = np.array([[1.0, 1.0, 0.0, 1.0]]), np.array([[0.0, 1.0, 0.0, 0.0]])
    ones = np.ones(4)
    assert ours.compare(first, second, ones, seed=0) == ours.mcnemar(first[0], second[0])
    with pytest.raises(ValueError, match="different items"):
        ours.compare(first, second[:, :2], ones, seed=0)


def mmd2_by_loops(x: ours.Array, y: ours.Array, bandwidth: float) -> float:
    def kernel(a: ours.Array, b: ours.Array) -> float:
        return float(np.exp(-np.sum((a - b) ** 2) / (2 * bandwidth**2)))

    within = [np.mean([kernel(a, b) for a, b in permutations(side, 2)]) for side in (x, y)]
    return float(sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_mmd_matches_its_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(0.5, size=(5, 3))
    assert ours.mmd2(x, y, 1.3) == pytest.approx(mmd2_by_loops(x, y, 1.3))
    pool = np.concatenate([x, y])
    distances = [np.linalg.norm(a - b) for a, b in combinations(pool, 2)]
    assert ours.median_distance(pool) == pytest.approx(np.median(distances))
    assert ours.median_distance(np.ones((3, 2))) == 1.0


def test_paired_comparison() -> None:
    rng = np.random.default_rng(1)
    old = rng.normal(size=40)
    new = old - 0.5 + 0.1 * rng.normal(size=40)
    found = ours.compare_paired(list(old), list(new), seed=0)
    assert found["difference"] == pytest.approx(np.mean(new) - np.mean(old))
    error = np.std(new - old, ddof=1) / np.sqrt(40)
    assert found["low"] == pytest.approx(found["difference"] - 1.96 * error, abs=0.3 * error)
    assert found["high"] == pytest.approx(found["difference"] + 1.96 * error, abs=0.3 * error)
    assert found["p"] < 1e-6
    assert ours.compare_paired([1.0, 2.0], [1.0, 2.0], seed=0)["p"] == 1.0


def test_distribution_distances() -> None:
    old, new = [1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]
    found = ours.compare_distributions(old, new)
    assert found["ks"] == pytest.approx(0.5)  # at 2: half of the old ones, none of the new
    assert found["wasserstein"] == pytest.approx(np.mean(np.sort(new) - np.sort(old)))


def test_the_interval_is_students_of_the_mean() -> None:
    # The 97.5 % quantile of Student's t with two degrees of freedom is 4.302653.
    assert ours.mean_with_ci([1.0, 2.0, 3.0]).error == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert ours.mean_with_ci([2.0]) == ours.MeanWithCI(mean=2.0, error=None)
