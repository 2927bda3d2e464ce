"""Which tokens of a response count, and how much: one weight in [0, 1] for each token.

Shape legend: R response tokens, K ids. Formulas and sources: ALGORITHMS section 3.
"""

from collections.abc import Sequence

import numpy as np

from megadistill.algorithms.gaps import log_odds
from megadistill.config.distillation import (
    AcceptedTokens,
    EntropyTokens,
    PrefixTokens,
    TeacherEntropyTokens,
    Tokens,
)
from megadistill.types import FloatArray, Int32Array, Scored


def largest_share(entropy_R: Sequence[FloatArray], share: float) -> list[FloatArray]:
    """1 where a token's entropy is in the largest `share` of all tokens' (Relaxed OPD, phase II).

    The threshold is the quantile 1 - share, interpolated linearly, of all responses together.
    """
    threshold = np.quantile(np.concatenate(entropy_R), 1 - share)
    return [(own_R >= threshold).astype(np.float32) for own_R in entropy_R]


def accepted_greedily(proposed_R: Int32Array, teacher_ids_RK: Int32Array) -> FloatArray:
    """1 where the student's most probable id is among the teacher's K (SelecTKD, greedy Top-k)."""
    accepted_R: FloatArray = (teacher_ids_RK == proposed_R[:, None]).any(axis=1).astype(np.float32)
    return accepted_R


def accepted_at_random(gap_R: FloatArray, seed: Sequence[int]) -> FloatArray:
    """1 with probability min(1, p / q) of the response's own token (SelecTKD, Spec-k with one draw).

    The response was drawn from the student, so its token is a draw of Spec-k's.
    """
    chance_R = np.exp(np.minimum(gap_R.astype(np.float64), 0))
    drawn_R = np.random.default_rng(seed).random(len(gap_R))
    accepted_R: FloatArray = (drawn_R < chance_R).astype(np.float32)
    return accepted_R


def token_weights(
    rule: Tokens, group: Sequence[Scored], *, explores: bool, floor: float | None, seed: int
) -> list[FloatArray]:
    """The weights of each response of one branch; `explores` says that Relaxed OPD's phase I holds."""
    if isinstance(rule, EntropyTokens):
        if explores:
            assert floor is not None
            bound = log_odds(floor)
            return [(item.gap_R >= bound).astype(np.float32) for item in group]
        return largest_share([_known(item.student.entropy_R) for item in group], rule.share)
    if isinstance(rule, AcceptedTokens):
        taken = [_accepted(rule, item, [seed, index]) for index, item in enumerate(group)]
        return [own_R + np.float32(rule.weight) * (1 - own_R) for own_R in taken]
    if isinstance(rule, PrefixTokens):
        return [(np.arange(len(item.gap_R)) < rule.tokens).astype(np.float32) for item in group]
    if isinstance(rule, TeacherEntropyTokens):
        entropies = [_known(item.teacher.entropy_R) for item in group]
        return [(own_R > rule.above).astype(np.float32) for own_R in entropies]
    return [np.ones(len(item.gap_R), dtype=np.float32) for item in group]


def _accepted(rule: AcceptedTokens, item: Scored, seed: Sequence[int]) -> FloatArray:
    if rule.rule == "sampled":
        return accepted_at_random(item.gap_R, seed)
    assert item.student.top_k is not None
    assert item.teacher.top_k is not None
    teacher_ids_RK = item.teacher.top_k.ids_RK[:, : rule.size]
    return accepted_greedily(item.student.top_k.ids_RK[:, 0], teacher_ids_RK)


def _known(entropy_R: FloatArray | None) -> FloatArray:
    assert entropy_R is not None
    return entropy_R
