"""Measures of what refinement did to a set of answers (ALGORITHMS 2.6); pure functions.

Shape legend: N texts, D embedding.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Words = Sequence[str]

BOOTSTRAP = 10_000
_WORD = re.compile(r"\w+")
STYLE = {
    "headings": re.compile(r"^#{1,6} ", re.MULTILINE),
    "list items": re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
}


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def squared_distances(first_ND: Array, second_ND: Array) -> Array:
    """||x - y||^2 of every pair."""
    products = first_ND @ second_ND.T
    squares = (first_ND**2).sum(1)[:, None] + (second_ND**2).sum(1)[None, :]
    distances: Array = np.maximum(squares - 2 * products, 0.0)
    return distances


def median_distance(vectors_ND: Array) -> float:
    """Median distance of two different vectors: the bandwidth of the kernel."""
    above = np.triu_indices(len(vectors_ND), k=1)
    median = float(np.median(np.sqrt(squared_distances(vectors_ND, vectors_ND)[above])))
    return median or 1.0


def mmd2(first_ND: Array, second_ND: Array, bandwidth: float) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel exp(-||x-y||^2 / 2 bandwidth^2)."""

    def kernel(x: Array, y: Array) -> Array:
        return np.exp(-squared_distances(x, y) / (2 * bandwidth**2))

    def within(x: Array) -> float:
        count = len(x)
        return float((kernel(x, x).sum() - count) / (count * (count - 1)))

    return within(first_ND) + within(second_ND) - 2 * float(kernel(first_ND, second_ND).mean())


def containment(new: Words, old: Words, n: int) -> float | None:
    """Share of the n-grams of `new` that `old` has too, as multisets; None if there are none."""
    grams = Counter(zip(*(new[k:] for k in range(n)), strict=False))
    known = Counter(zip(*(old[k:] for k in range(n)), strict=False))
    total = sum(grams.values())
    return sum((grams & known).values()) / total if total else None


def rouge_l(new: Words, old: Words) -> float:
    """F1 of the longest common subsequence."""
    common = common_subsequence(new, old)
    return 2 * common / (len(new) + len(old)) if new or old else 1.0


def common_subsequence(first: Words, second: Words) -> int:
    """Length of the longest common subsequence, by the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for position, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << position
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & everything
    return len(first) - row.bit_count()


def copy_rate(new: Words, old: Words) -> float:
    """Length of the longest run of words common to both, by the length of `new`."""
    return common_run(old, new) / len(new) if new else 0.0


def common_run(text: Words, other: Words) -> int:
    """Length of the longest run of words in both.

    Each word becomes one character, so that runs are looked for by the search of strings, whose time
    is linear; difflib takes the square where a model repeats itself.
    """
    characters: dict[str, str] = {}
    first, second = (
        "".join(characters.setdefault(word, chr(len(characters))) for word in words)
        for words in (text, other)
    )
    longest = 0
    for start in range(len(first)):
        while start + longest < len(first) and first[start : start + longest + 1] in second:
            longest += 1
    return longest


def style_of(text: str, num_tokens: int) -> dict[str, float]:
    """Headings, list items and bold passages per 100 tokens."""
    return {
        name: 100 * len(pattern.findall(text)) / max(num_tokens, 1)
        for name, pattern in STYLE.items()
    }


def compare_paired(old: Sequence[float], new: Sequence[float], seed: int) -> dict[str, float]:
    """Means, the difference with its bootstrapped 95 % interval, and Wilcoxon's p."""
    before, after = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    difference = after - before
    draws = np.random.default_rng(seed).integers(len(difference), size=(BOOTSTRAP, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), (0.025, 0.975))
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


def judge_agreement(
    scored: Sequence[Mapping[str, float | None]], accept: float
) -> list[dict[str, Any]]:  # values: names and numbers
    """For every two judges, over what both scored: mean difference, correlation, kappa at the bar."""
    judges = sorted({judge for scores in scored for judge in scores})
    rows = []
    for first, second in combinations(judges, 2):
        pairs = [
            (a, b)
            for scores in scored
            if (a := scores.get(first)) is not None and (b := scores.get(second)) is not None
        ]
        if pairs:
            x, y = (np.asarray(side, dtype=np.float64) for side in zip(*pairs, strict=True))
            rows.append({"judges": [first, second], **_agreement(x, y, accept)})
    return rows


def _agreement(x: Array, y: Array, accept: float) -> dict[str, Any]:
    above_x, above_y = x >= accept - 1e-9, y >= accept - 1e-9
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
