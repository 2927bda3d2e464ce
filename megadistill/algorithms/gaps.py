"""From token gaps to weights: scores, gap-mass selection and the importance mask of CaMOPD.

Shape legend: N samples, R response tokens. Formulas: CaMOPD, arXiv:2605.27115.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megadistill.types import FloatArray

MASS_TOLERANCE = 1e-9
"""Relative slack of the prefix sum, so that ten equal scores at rho = 0.8 keep eight."""


def mean_absolute_gap(gap_R: FloatArray) -> float:
    """s_g of Eq. (6): (1/T) sum |Delta_t|, summed in float64."""
    return float(np.abs(gap_R.astype(np.float64)).mean())


def mean_positive_gap(gap_R: FloatArray) -> float:
    """s_d of Eq. (7): (1/T) sum max(Delta_t, 0), summed in float64."""
    return float(np.maximum(gap_R.astype(np.float64), 0).mean())


def select_by_mass(scores_N: Sequence[float], mass: float) -> list[int]:
    """Eq. (8): indices of the fewest largest scores that hold `mass` of their sum.

    Ties go to the lower index; the result is in descending order of score. All scores zero keeps
    everything: there is no mass to choose by, and the gradient is zero anyway.
    """
    scores = np.asarray(scores_N, dtype=np.float64)
    total = scores.sum()
    order = np.argsort(-scores, kind="stable")
    if total <= 0:
        return [int(index) for index in order]
    reached = np.cumsum(scores[order]) >= mass * total - MASS_TOLERANCE * total
    return [int(index) for index in order[: int(np.argmax(reached)) + 1]]


def importance_weights(
    student_logprobs_R: FloatArray, rollout_logprobs_R: FloatArray, low: float, high: float
) -> FloatArray:
    """w_t of MiMo-V2-Flash Eq. (7)-(8): pi/mu inside [low, high], 0 outside (a mask, not a clamp).

    Float32; the caller keeps masked tokens in the denominator.
    """
    difference = student_logprobs_R.astype(np.float64) - rollout_logprobs_R.astype(np.float64)
    ratio_R: npt.NDArray[np.float64] = np.exp(np.clip(difference, -60, 60))
    inside = (ratio_R >= low) & (ratio_R <= high)
    return np.where(inside, ratio_R, 0.0).astype(np.float32)
