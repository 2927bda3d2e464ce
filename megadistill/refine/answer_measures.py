"""Overlap and style of a refined and a raw answer (ALGORITHMS 2.6); pure functions."""

import re
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]

_UNSPACED = "".join(
    (
        "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff",  # Thai, Lao, Burmese, Khmer
        "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f",  # Japanese kana
        "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",  # Chinese characters
    )
)
"""Ranges of the scripts that put no blanks between words."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
STYLE = {
    "headings": re.compile(r"^#{1,6} ", re.MULTILINE),
    "list items": re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
}


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation; a character is one where no blanks part words."""
    return _WORD.findall(text.lower())


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
