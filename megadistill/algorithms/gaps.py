"""From token gaps to weights: scores, gap-mass selection, importance weights and advantages.

Shape legend: N samples, R response tokens. Formulas: CaMOPD, arXiv:2605.27115.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megadistill.config.distillation import AdvantageConfig, ImportanceConfig
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
    student_logprobs_R: FloatArray, rollout_logprobs_R: FloatArray, config: ImportanceConfig
) -> tuple[FloatArray, FloatArray]:
    """Weight of each token for a rollout engine that samples from mu, not pi; and what is counted.

    float32, both [R]. With rho_t = pi / mu of the token, frozen, and the bounds [low, high]:
    `mask`, `icepop`: rho_t inside, else 0 (MiMo-V2-Flash Eq. 7-8); `truncate`: min(max(rho_t, low),
    high) (TIS); `mis`: as `mask`, 0 everywhere where any rho_t < veto; `sequence`: rho_t everywhere, or
    0 where the geometric mean of all rho_t is outside; `none`: 1. The second array is 1 where a token
    belongs to the average's length: everywhere, but with `mis` only inside the bounds.
    """
    difference = student_logprobs_R.astype(np.float64) - rollout_logprobs_R.astype(np.float64)
    ratio_R: npt.NDArray[np.float64] = np.exp(np.clip(difference, -60, 60))
    low, high = config.bounds
    inside_R = (ratio_R >= low) & (ratio_R <= high)
    counted_R = np.ones(len(ratio_R), dtype=np.float32)
    if config.kind == "none":
        return counted_R, counted_R
    if config.kind == "truncate":
        return np.clip(ratio_R, low, high).astype(np.float32), counted_R
    if config.kind == "sequence":
        mean = np.exp(difference.mean()) if len(difference) else 1.0
        return (ratio_R if low <= mean <= high else 0 * ratio_R).astype(np.float32), counted_R
    if config.kind == "mis":
        inside_R &= not (ratio_R < config.veto).any()
        counted_R = inside_R.astype(np.float32)
    return np.where(inside_R, ratio_R, 0.0).astype(np.float32), counted_R


def advantage(
    gap_R: FloatArray,
    config: AdvantageConfig,
    *,
    reference_gap_R: FloatArray | None = None,
    expected_gap_R: FloatArray | None = None,
) -> FloatArray:
    """A_t of a token from its gap Delta = log pi_T - log pi_student; float32 [R].

    With a reference A = lambda log(pi_T / pi_ref) - log(pi_student / pi_ref), which is
    lambda Delta + (1 - lambda) (log pi_ref - log pi_student) (G-OPD, arXiv:2602.12125);
    `reference_gap_R` is log pi_ref - log pi_student. Without one A = lambda Delta. A baseline subtracts
    the token's expected gap, -KL(student || teacher) (vOPD, arXiv:2605.07865). A floor bounds the result
    below at log(lambda / (1 - lambda)) (Relaxed OPD, arXiv:2603.11137).
    """
    shaped_R = gap_R
    if config.scale != 1:
        shaped_R = config.scale * shaped_R
    if reference_gap_R is not None:
        shaped_R = shaped_R + (1 - config.scale) * reference_gap_R
    if expected_gap_R is not None:
        shaped_R = shaped_R - expected_gap_R
    if config.floor is not None:
        shaped_R = np.maximum(shaped_R, log_odds(config.floor))
    return shaped_R.astype(np.float32)


def log_odds(probability: float) -> float:
    """log(lambda / (1 - lambda)), Relaxed OPD's bound below the advantage."""
    return math.log(probability / (1 - probability))
