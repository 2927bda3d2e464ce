"""Random choice that is a pure function of a seed; it takes 16 bytes a row to choose from."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megadistill.data.pools import stable_hash

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
    keys = [
        _mix(
            np.arange(1, size + 1, dtype=np.uint64) + np.uint64(stable_hash(f"{seed}/{name}/{at}"))
        )
        for at, size in enumerate(sizes)
    ]
    order = np.argsort(np.concatenate(keys), kind="stable")[:count]
    ends = np.cumsum(sizes)
    files = np.searchsorted(ends, order, side="right")
    numbers = order - (ends - sizes)[files] + 1
    return list(zip(files.tolist(), numbers.tolist(), strict=True))


def _mix(values: _Keys) -> _Keys:
    """The finaliser of SplitMix64: neighbouring numbers to unrelated ones, one to one."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    result: _Keys = mixed ^ (mixed >> np.uint64(31))
    return result
