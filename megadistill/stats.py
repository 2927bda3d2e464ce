"""Intervals, tests and distances: of scores of benchmarks, of runs, and of refined against raw answers.

A system's result is one array of shape [S, I]: S seeds (trainings of the same recipe) and I items,
each entry the mean of the item's samples. Weights make every aggregate a weighted mean over items:
all ones for an accuracy, unequal for a mean of category means or for Arena-Hard's repeated entries.

Shape legend: S seeds, I items, B bootstrap draws, N vectors, D their components.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.spatial import distance

Array = npt.NDArray[np.float64]
DRAWS = 10_000
CHUNK = 1 << 22
"""Most random numbers at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with bounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanWithCI:
    """Mean of a quantity over repetitions of an experiment."""

    mean: float
    error: float | None
    """Half of the confidence interval (Student's t) of the mean; None for a single value."""

    @property
    def text(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def mean_with_ci(values: Sequence[float], confidence: float = 0.95) -> MeanWithCI:
    """Mean, and its interval where there are several values."""
    count = len(values)
    if count == 1:
        return MeanWithCI(mean=values[0], error=None)
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    error = quantile * statistics.stdev(values) / count**0.5
    return MeanWithCI(mean=statistics.fmean(values), error=error)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion."""
    found = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(value=successes / trials, low=float(found.low), high=float(found.high))


def bootstrap_means(
    arrays: Sequence[Array], weights_I: Array, *, seed: int, draws: int = DRAWS
) -> Array:
    """Weighted means of `draws` resamples of each array [S, I]: the same items for all of them and
    their seeds, and seeds of its own for each.
    """
    num_items = len(weights_I)
    random = np.random.default_rng(seed)
    means = np.empty((len(arrays), draws))
    step = max(1, CHUNK // num_items)
    for first in range(0, draws, step):
        count = min(step, draws - first)
        items_BI = random.integers(num_items, size=(count, num_items))
        totals_B = weights_I[items_BI].sum(1)
        for number, values_SI in enumerate(arrays):
            seeds_BS = random.integers(len(values_SI), size=(count, len(values_SI)))
            sums_SB = np.stack([row[items_BI].sum(1) for row in values_SI * weights_I])
            chosen_B = np.take_along_axis(sums_SB, seeds_BS.T, axis=0).mean(0)
            means[number, first : first + count] = chosen_B / totals_B
    return means


def _counted(weights_I: Array, *arrays_SI: Array) -> list[Array]:
    """The weights and arrays without items of weight 0, which are in no mean.

    A resample of nothing but them would have none. Raises `ValueError` when there are no others.
    """
    (counted,) = weights_I.nonzero()
    if not len(counted):
        raise ValueError(f"found no weight above 0 among those of {len(weights_I)} items")
    return [array[..., counted] for array in (weights_I, *arrays_SI)]


def bootstrap(
    values_SI: Array,
    weights_I: Array | None = None,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    draws: int = DRAWS,
) -> Interval:
    """Percentile interval of the weighted mean."""
    weights_I = np.ones(values_SI.shape[1]) if weights_I is None else weights_I
    weights_I, values_SI = _counted(weights_I, values_SI)
    (means,) = bootstrap_means([values_SI], weights_I, seed=seed, draws=draws)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = np.average(values_SI.mean(0), weights=weights_I)
    return Interval(value=float(value), low=float(low), high=float(high))


def is_binary(values_SI: Array) -> bool:
    """Whether these are single right-or-wrong answers of one model."""
    return len(values_SI) == 1 and bool(np.isin(values_SI, (0.0, 1.0)).all())


def interval(
    values_SI: Array, weights_I: Array, *, seed: int, confidence: float, shares: bool = True
) -> Interval:
    """Wilson's where answers are right or wrong and count the same, else the bootstrap's.

    `shares`: whether 0 and 1 mean wrong and right; of a divergence they are numbers like others.
    """
    weights_I, values_SI = _counted(weights_I, values_SI)
    if shares and is_binary(values_SI) and bool((weights_I == weights_I[0]).all()):
        return wilson(int(values_SI.sum()), values_SI.shape[1], confidence)
    return bootstrap(values_SI, weights_I, seed=seed, confidence=confidence)


def mcnemar(first_I: Array, second_I: Array) -> float:
    """Exact two-sided p-value that two models are right equally often, from where they differ."""
    only_first = int(((first_I == 1) & (second_I == 0)).sum())
    only_second = int(((first_I == 0) & (second_I == 1)).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def paired_bootstrap(
    first_SI: Array, second_SI: Array, weights_I: Array, *, seed: int = 0, draws: int = DRAWS
) -> float:
    """Two-sided p-value of the difference of weighted means, items resampled together.

    Twice the smaller share of resampled differences on one side of zero, counting the sample itself.
    """
    weights_I, first_SI, second_SI = _counted(weights_I, first_SI, second_SI)
    random = np.random.default_rng(seed)
    item_seed = int(random.integers(1 << 62))
    if len(first_SI) == len(second_SI) == 1:
        (differences,) = bootstrap_means(
            [first_SI - second_SI], weights_I, seed=item_seed, draws=draws
        )
    else:  # the same items for both, but each system's own seeds
        one, other = bootstrap_means([first_SI, second_SI], weights_I, seed=item_seed, draws=draws)
        differences = one - other
    below = (1 + int((differences <= 0).sum())) / (draws + 1)
    above = (1 + int((differences >= 0).sum())) / (draws + 1)
    return min(1.0, 2 * min(below, above))


def compare(first_SI: Array, second_SI: Array, weights_I: Array, *, seed: int) -> float:
    """McNemar's p-value where both give right-or-wrong answers, else the paired bootstrap's."""
    if first_SI.shape[1] != second_SI.shape[1]:
        raise ValueError("found results on different items, expected the same")
    weights_I, first_SI, second_SI = _counted(weights_I, first_SI, second_SI)
    equal = bool((weights_I == weights_I[0]).all())
    if equal and is_binary(first_SI) and is_binary(second_SI):
        return mcnemar(first_SI[0], second_SI[0])
    return paired_bootstrap(first_SI, second_SI, weights_I, seed=seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: below alpha exactly where Holm's procedure rejects at alpha.

    NaN, a test that could not be made, stays so and is not counted.
    """
    adjusted = list(p_values)
    made = [index for index, p in enumerate(p_values) if not math.isnan(p)]
    largest = 0.0
    for rank, index in enumerate(sorted(made, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(made) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare_paired(old: Sequence[float], new: Sequence[float], seed: int) -> dict[str, float]:
    """Means, the difference with its bootstrapped 95 % interval, and Wilcoxon's p."""
    before, after = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    difference = after - before
    (means,) = bootstrap_means([difference[None]], np.ones(len(difference)), seed=seed)
    low, high = np.quantile(means, (0.025, 0.975))
    p = 1.0 if not difference.any() else float(stats.wilcoxon(after, before).pvalue)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "p": p,
    }


def compare_distributions(old: Sequence[float], new: Sequence[float]) -> dict[str, float]:
    """Kolmogorov-Smirnov statistic with its p, and Wasserstein-1."""
    found = stats.ks_2samp(old, new)
    return {
        "ks": float(found.statistic),
        "ks_p": float(found.pvalue),
        "wasserstein": float(stats.wasserstein_distance(old, new)),
    }


def agreement(x: Array, y: Array, bar: float) -> dict[str, float | int | None]:
    """Of two raters over the same things: mean difference, correlation, and kappa at the bar."""
    above_x, above_y = x >= bar - 1e-9, y >= bar - 1e-9
    same = float((above_x == above_y).mean())
    chance = float(above_x.mean() * above_y.mean() + (1 - above_x.mean()) * (1 - above_y.mean()))
    varies = x.std() > 0 and y.std() > 0
    return {
        "candidates": len(x),
        "mean_absolute_difference": float(np.abs(x - y).mean()),
        "correlation": float(np.corrcoef(x, y)[0, 1]) if varies else None,
        "same_side_of_bar": same,
        "kappa": (same - chance) / (1 - chance) if chance < 1 else None,
    }


def median_distance(vectors_ND: Array) -> float:
    """Median distance of two different vectors: the bandwidth of the kernel."""
    return float(np.median(distance.pdist(vectors_ND))) or 1.0


def mmd2(first_ND: Array, second_ND: Array, bandwidth: float) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel exp(-||x-y||^2 / 2 bandwidth^2)."""

    def kernel(x: Array, y: Array) -> Array:
        values: Array = np.exp(-distance.cdist(x, y, "sqeuclidean") / (2 * bandwidth**2))
        return values

    def within(x: Array) -> float:
        count = len(x)
        return float((kernel(x, x).sum() - count) / (count * (count - 1)))

    return within(first_ND) + within(second_ND) - 2 * float(kernel(first_ND, second_ND).mean())
