"""Random choice that is a pure function of a seed and takes memory for the chosen rows only."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megadistill.data.pools import stable_hash

CHUNK = 1 << 20
_Keys = npt.NDArray[np.uint64]


def largest_remainder(weights: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` shared out in proportion to the weights: floors first, then the largest remainders."""
    whole = sum(weights.values())
    shares = {name: total * weight // whole for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: -(total * weights[name] % whole))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def draw_rows(sizes: Sequence[int], count: int, seed: int, name: str) -> list[tuple[int, int]]:
    """`count` rows, without replacement, as (file index, row number from 1), in random order.

    Each row has a random key that depends on nothing but the seed, the name and its position; the
    smallest win. So a larger draw begins with a smaller one.
    """
    best: list[tuple[_Keys, npt.NDArray[np.int64]]] = []
    for index, size in enumerate(sizes):
        salt = np.uint64(stable_hash(f"{seed}/{name}/{index}"))
        for first in range(1, size + 1, CHUNK):
            numbers = np.arange(first, min(first + CHUNK, size + 1), dtype=np.int64)
            keys = _mix(numbers.astype(np.uint64) + salt)
            best = [
                _smallest([*best, (keys, np.stack([np.full_like(numbers, index), numbers]))], count)
            ]
    if not best:
        return []
    ((_, places),) = best
    return [(int(index), int(number)) for index, number in places.T]


def _smallest(
    pools: Sequence[tuple[_Keys, npt.NDArray[np.int64]]], count: int
) -> tuple[_Keys, npt.NDArray[np.int64]]:
    keys = np.concatenate([keys for keys, _ in pools])
    places = np.concatenate([places for _, places in pools], axis=1)
    order = np.argsort(keys, kind="stable")[:count]
    return keys[order], places[:, order]


def _mix(values: _Keys) -> _Keys:
    """The finaliser of SplitMix64: neighbouring numbers to unrelated ones, one to one."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    result: _Keys = mixed ^ (mixed >> np.uint64(31))
    return result
