"""Do the gradients of a set of samples pull together? Diagnostics of CaMOPD section 4.4.

Shape legend: N samples, P parameters.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32] | npt.NDArray[np.float64]


def coherence(gradients_NP: Array) -> float:
    """Coh(A) = |sum_i g_i| / sum_i |g_i|: 1 when all agree, 1/sqrt(N) when they are orthogonal.

    Zero gradients only: 0.
    """
    total = float(np.linalg.norm(gradients_NP, axis=1).sum())
    return float(np.linalg.norm(gradients_NP.sum(axis=0))) / total if total else 0.0


def coherence_gain(gradients_NP: Array, selected: Sequence[int]) -> float:
    """GCG in percent: how much more coherent the selected samples are than all of them.

    It grows with fewer samples alone: report `size_matched_gain` beside it.
    """
    full = coherence(gradients_NP)
    return 100 * (coherence(gradients_NP[list(selected)]) - full) / full


def size_matched_gain(
    gradients_NP: Array, selected: Sequence[int], *, num_subsets: int = 20, seed: int = 0
) -> float:
    """GCG against the mean coherence of random subsets of the same size, in percent."""
    generator = np.random.default_rng(seed)
    count = len(selected)
    subsets = (
        generator.choice(len(gradients_NP), size=count, replace=False) for _ in range(num_subsets)
    )
    expected = float(np.mean([coherence(gradients_NP[subset]) for subset in subsets]))
    return 100 * (coherence(gradients_NP[list(selected)]) - expected) / expected


def interference(first_P: Array, second_P: Array) -> tuple[float, float]:
    """Dot product and cosine of two branches' gradients at the same parameters (Fig. 1)."""
    dot = float(first_P @ second_P)
    norms = float(np.linalg.norm(first_P) * np.linalg.norm(second_P))
    return dot, dot / norms if norms else float("nan")


def agreement(gradients: Mapping[str, Array]) -> dict[str, float]:
    """Dot product and cosine of every pair of branches, as metrics; no cosine where a gradient is 0."""
    found: dict[str, float] = {}
    for first, second in combinations(gradients, 2):
        dot, cosine = interference(gradients[first], gradients[second])
        found[f"probe/{first}_{second}_dot"] = dot
        if not np.isnan(cosine):
            found[f"probe/{first}_{second}_cosine"] = cosine
    return found
