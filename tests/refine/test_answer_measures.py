"""The diagnostics' measures against the same computed the long way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.refine import answer_measures

Words = st.lists(st.sampled_from("abcd"), max_size=14)


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
    assert answer_measures.common_subsequence(a, b) == longest_common_subsequence(a, b)
    assert answer_measures.common_run(a, b) == longest_common_run(a, b)


def test_overlap_of_a_small_example() -> None:
    old, new = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "and", "the", "dog", "sat"]
    # Unigrams of the new text: the x2, cat, sat are in the old one; and, dog are not.
    assert answer_measures.containment(new, old, 1) == pytest.approx(4 / 6)
    assert answer_measures.containment(new, old, 2) == pytest.approx(1 / 5)
    assert answer_measures.containment(new, old, 4) == 0.0
    assert answer_measures.containment(["a", "a", "a"], ["a"], 1) == pytest.approx(1 / 3)
    assert answer_measures.containment(["a"], old, 2) is None
    assert answer_measures.rouge_l(new, old) == pytest.approx(2 * 3 / 12)
    assert answer_measures.copy_rate(new, old) == pytest.approx(2 / 6)
    assert (answer_measures.rouge_l([], []), answer_measures.copy_rate([], old)) == (1.0, 0.0)


def test_huge_repetitive_texts_take_no_time() -> None:
    text = ["a"] * 50_000
    assert answer_measures.copy_rate(text, text) == 1.0


def test_style_counts_per_hundred_tokens() -> None:
    text = "# Head\n\n- one\n* two\n3. three\nplain **bold** and ** not bold\n"
    found = answer_measures.style_of(text, 50)
    assert found == {"headings": 2.0, "list items": 6.0, "bold": 2.0}
