"""Texts that say the same: near duplicates among records, and benchmark items inside them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from datasketch import LeanMinHash, MinHash, MinHashLSH

from megadistill.data.pools import stable_hash
from megadistill.refine.answer_measures import words_of

NUM_HASHES = 64
ROWS = 4
"""Hashes of one band: with 16 bands a pair of similarity 0.8 is found with probability 0.9998."""


def grams(words: Sequence[str], n: int) -> Iterator[str]:
    """Runs of `n` words; of fewer words the only run there is."""
    if words:
        for start in range(max(1, len(words) - n + 1)):
            yield " ".join(words[start : start + n])


class NearDuplicates:
    """Finds a text much like an earlier one, by MinHash and banding; about 6 KB a text."""

    def __init__(self, n: int, threshold: float) -> None:
        self._n = n
        self._threshold = threshold
        self._empty = MinHash(num_perm=NUM_HASHES, seed=0, scheme="affine32")
        self._index = MinHashLSH(num_perm=NUM_HASHES, params=(NUM_HASHES // ROWS, ROWS))
        self._signatures: list[LeanMinHash] = []

    def is_new(self, text: str) -> bool:
        """Whether no earlier new text is like this one, which then counts as earlier itself."""
        found = {gram.encode() for gram in grams(words_of(text), self._n)}
        if not found:
            return True
        minhash = self._empty.copy()
        minhash.update_batch(found)
        signature = LeanMinHash(minhash)
        alike = (self._signatures[number] for number in self._index.query(signature))
        if any(other.jaccard(signature) >= self._threshold for other in alike):
            return False
        self._index.insert(len(self._signatures), signature, check_duplication=False)
        self._signatures.append(signature)
        return True


class BenchmarkItems:
    """The n-grams of benchmarks' items.

    One n-gram in common is no proof: examination questions share whole sentences of vital signs. So
    a text counts as containing an item when it has a good share of that item's n-grams.
    """

    def __init__(self, n: int, least: int, share: float) -> None:
        self._n = n
        self._least = least
        self._share = share
        self._items: list[tuple[str, int]] = []
        """Benchmark, and number of distinct n-grams."""
        self._grams: dict[int, list[int]] = {}
        self._lengths: set[int] = set()
        self.counts: dict[str, dict[str, int]] = {}
        """Of each benchmark: items that are `looked_for`, and those `too_short` for it."""

    def add(self, benchmark: str, texts: Iterable[str]) -> None:
        count = self.counts.setdefault(benchmark, {"looked_for": 0, "too_short": 0})
        for text in texts:
            words = words_of(text)
            is_short = len(words) < self._least
            count["too_short" if is_short else "looked_for"] += 1
            if is_short:
                continue
            self._lengths.add(min(len(words), self._n))
            found = {stable_hash(gram) for gram in grams(words, self._n)}
            for gram in found:
                self._grams.setdefault(gram, []).append(len(self._items))
            self._items.append((benchmark, len(found)))

    def found_in(self, text: str) -> str | None:
        """The benchmark of an item that a text contains, if any."""
        words = words_of(text)
        shared: Counter[int] = Counter()
        for length in self._lengths:
            if len(words) >= length:
                for gram in {stable_hash(gram) for gram in grams(words, length)}:
                    shared.update(self._grams.get(gram, ()))
        for item, count in shared.most_common():
            benchmark, total = self._items[item]
            if count >= self._share * total:
                return benchmark
        return None
