"""Texts that say the same: near duplicates among records, and benchmark items inside them."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

_WORD = re.compile(r"\w+")
_UInt64 = npt.NDArray[np.uint64]
NUM_HASHES = 64
ROWS = 4
"""Hashes of one band: with 16 bands a pair of similarity 0.8 is found with probability 0.9998."""


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def grams(words: Sequence[str], n: int) -> Iterator[str]:
    """Runs of `n` words; of fewer words the only run there is."""
    if words:
        for start in range(max(1, len(words) - n + 1)):
            yield " ".join(words[start : start + n])


def gram_hash(gram: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little")


class NearDuplicates:
    """Finds a text much like an earlier one, by MinHash and banding; 512 bytes a text."""

    def __init__(self, n: int, threshold: float) -> None:
        self._n = n
        self._threshold = threshold
        random = np.random.default_rng(0)
        self._factors: _UInt64 = random.integers(1, 1 << 63, NUM_HASHES, dtype=np.uint64) * 2 + 1
        self._offsets: _UInt64 = random.integers(0, 1 << 63, NUM_HASHES, dtype=np.uint64)
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        self._signatures: list[_UInt64] = []

    def is_new(self, text: str) -> bool:
        """Whether no earlier new text is like this one, which then counts as earlier itself."""
        signature = self._signature(text)
        if signature is None:
            return True
        keys = [
            (band, signature[band : band + ROWS].tobytes()) for band in range(0, NUM_HASHES, ROWS)
        ]
        for other in {number for key in keys for number in self._bands.get(key, ())}:
            if np.mean(self._signatures[other] == signature) >= self._threshold:
                return False
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        return True

    def _signature(self, text: str) -> _UInt64 | None:
        hashes = {gram_hash(gram) for gram in grams(words_of(text), self._n)}
        if not hashes:
            return None
        values = np.fromiter(hashes, dtype=np.uint64, count=len(hashes))
        # Multiply-shift hashing: the high half of an odd multiple modulo 2^64.
        mixed = (values[:, None] * self._factors[None] + self._offsets[None]) >> np.uint64(32)
        signature: _UInt64 = mixed.min(axis=0)
        return signature


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

    def add(self, benchmark: str, texts: Iterable[str]) -> None:
        for text in texts:
            words = words_of(text)
            if len(words) < self._least:
                continue
            self._lengths.add(min(len(words), self._n))
            found = {gram_hash(gram) for gram in grams(words, self._n)}
            for gram in found:
                self._grams.setdefault(gram, []).append(len(self._items))
            self._items.append((benchmark, len(found)))

    def found_in(self, text: str) -> str | None:
        """The benchmark of an item that a text contains, if any."""
        words = words_of(text)
        shared: Counter[int] = Counter()
        for length in self._lengths:
            if len(words) >= length:
                for gram in {gram_hash(gram) for gram in grams(words, length)}:
                    shared.update(self._grams.get(gram, ()))
        for item, count in shared.most_common():
            benchmark, total = self._items[item]
            if count >= self._share * total:
                return benchmark
        return None
