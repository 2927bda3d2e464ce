"""The diagnostics' measures against the same computed the long way."""

from itertools import combinations, permutations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.refine import statistics

Array = npt.NDArray[np.float64]
Words = st.lists(st.sampled_from("abcd"), max_size=14)


def mmd2_by_loops(x: Array, y: Array, bandwidth: float) -> float:
    def kernel(a: Array, b: Array) -> float:
        return float(np.exp(-np.sum((a - b) ** 2) / (2 * bandwidth**2)))

    within = [np.mean([kernel(a, b) for a, b in permutations(side, 2)]) for side in (x, y)]
    return float(sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_mmd_matches_its_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(0.5, size=(5, 3))
    assert statistics.mmd2(x, y, 1.3) == pytest.approx(mmd2_by_loops(x, y, 1.3))
    pool = np.concatenate([x, y])
    distances = [np.linalg.norm(a - b) for a, b in combinations(pool, 2)]
    assert statistics.median_distance(pool) == pytest.approx(np.median(distances))
    assert statistics.median_distance(np.ones((3, 2))) == 1.0


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, j in np.ndindex(len(a), len(b)):
        best = max(table[i, j + 1], table[i + 1, j])
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else best
    return int(table[-1, -1])


def longest_common_run(a: list[str], b: list[str]) -> int:
    runs = {tuple(a[i:j]) for i in range(len(a)) for j in range(i, len(a) + 1)}
    other = {tuple(b[i:j]) for i in range(len(b)) for j in range(i, len(b) + 1)}
    return max((len(run) for run in runs & other), default=0)


@given(Words, Words)
def test_common_subsequences_and_runs_match_the_long_way(a: list[str], b: list[str]) -> None:
    assert statistics.common_subsequence(a, b) == longest_common_subsequence(a, b)
    assert statistics.common_run(a, b) == longest_common_run(a, b)


def test_overlap_of_a_small_example() -> None:
    old, new = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "and", "the", "dog", "sat"]
    # Unigrams of the new text: the x2, cat, sat are in the old one; and, dog are not.
    assert statistics.containment(new, old, 1) == pytest.approx(4 / 6)
    assert statistics.containment(new, old, 2) == pytest.approx(1 / 5)
    assert statistics.containment(new, old, 4) == 0.0
    assert statistics.containment(["a", "a", "a"], ["a"], 1) == pytest.approx(1 / 3)
    assert statistics.containment(["a"], old, 2) is None
    assert statistics.rouge_l(new, old) == pytest.approx(2 * 3 / 12)
    assert statistics.copy_rate(new, old) == pytest.approx(2 / 6)
    assert (statistics.rouge_l([], []), statistics.copy_rate([], old)) == (1.0, 0.0)


def test_huge_repetitive_texts_take_no_time() -> None:
    text = ["a"] * 50_000
    assert statistics.copy_rate(text, text) == 1.0


def test_style_counts_per_hundred_tokens() -> None:
    text = "# Head\n\n- one\n* two\n3. three\nplain **bold** and ** not bold\n"
    found = statistics.style_of(text, 50)
    assert found == {"headings": 2.0, "list items": 6.0, "bold": 2.0}


def test_paired_comparison() -> None:
    rng = np.random.default_rng(1)
    old = rng.normal(size=40)
    new = old - 0.5 + 0.1 * rng.normal(size=40)
    found = statistics.compare_paired(list(old), list(new), seed=0)
    assert found["difference"] == pytest.approx(np.mean(new) - np.mean(old))
    error = np.std(new - old, ddof=1) / np.sqrt(40)
    assert found["low"] == pytest.approx(found["difference"] - 1.96 * error, abs=0.3 * error)
    assert found["high"] == pytest.approx(found["difference"] + 1.96 * error, abs=0.3 * error)
    assert found["p"] < 1e-6
    assert statistics.compare_paired([1.0, 2.0], [1.0, 2.0], seed=0)["p"] == 1.0


def test_distribution_distances() -> None:
    old, new = [1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]
    found = statistics.compare_distributions(old, new)
    assert found["ks"] == pytest.approx(0.5)  # at 2: half of the old ones, none of the new
    assert found["wasserstein"] == pytest.approx(np.mean(np.sort(new) - np.sort(old)))


def test_judges_agree_as_far_as_they_do() -> None:
    a, b = [0.9, 0.2, 0.8, 0.5], [0.8, 0.1, 0.7, 0.9]
    scored: list[dict[str, float | None]] = [
        {"a": None, "b": 0.3},
        {"b": 0.5},
    ]
    scored += [{"a": x, "b": y} for x, y in zip(a, b, strict=True)]
    (row,) = statistics.judge_agreement(scored, accept=0.8)
    assert row["judges"] == ["a", "b"]
    assert row["candidates"] == 4
    assert row["mean_absolute_difference"] == pytest.approx(np.mean(np.abs(np.subtract(a, b))))
    assert row["correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    # Above the bar: a has 1, 3; b has 1, 4. They agree on 1 and 2; chance is one half.
    assert row["same_side_of_bar"] == 0.5
    assert row["kappa"] == pytest.approx(0.0)
