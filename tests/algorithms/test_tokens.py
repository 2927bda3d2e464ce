"""Token rules against their tables in ALGORITHMS section 3 (W8)."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from megadistill.algorithms.tokens import accepted_at_random, largest_share, token_weights
from megadistill.config.distillation import Tokens
from megadistill.types import FloatArray, Scored, TokenScores, TopK
from tests.tiny import Tree, float32, make_scored

W8_ENTROPY = [0.1, 2.0, 0.5, 1.2, 0.05]


def weights(
    rule: Tree, *group: Scored, explores: bool = False, floor: float | None = None
) -> list[list[float]]:
    made: Tokens = TypeAdapter(Tokens).validate_python(rule)
    found = token_weights(made, group, explores=explores, floor=floor, seed=0)
    assert all(own_R.dtype == np.float32 for own_R in found)
    return [own_R.tolist() for own_R in found]


def scored(gaps: list[float], **teacher: object) -> Scored:
    return make_scored([0.0] * len(gaps), gaps, **teacher)  # type: ignore[arg-type]


def with_entropy(entropy: list[float], side: str = "student") -> Scored:
    item = scored([0.0] * len(entropy))
    scores = TokenScores(logprobs_R=item.student_logprobs_R, entropy_R=float32(entropy))
    return replace(item, student=scores) if side == "student" else replace(item, teacher=scores)


def test_every_token_counts_unless_a_rule_says_otherwise() -> None:
    assert weights({"kind": "all"}, scored([1.0, -1.0])) == [[1.0, 1.0]]


def test_the_most_uncertain_tokens_of_the_branch_are_kept() -> None:
    """W8: the threshold is 1.36; over two responses it is that of both together."""
    assert weights({"kind": "entropy", "share": 0.2}, with_entropy(W8_ENTROPY)) == [[0, 1, 0, 0, 0]]
    halves = [with_entropy(W8_ENTROPY[:2]), with_entropy(W8_ENTROPY[2:])]
    assert weights({"kind": "entropy", "share": 0.2}, *halves) == [[0, 1], [0, 0, 0]]
    (kept_R,) = largest_share([float32(W8_ENTROPY)], 0.4)
    assert kept_R.tolist() == [0, 1, 0, 1, 0]


def test_relaxed_opd_explores_by_the_floor_first() -> None:
    """W8: gaps (0.5, -0.2, -3) with the floor of lambda = 0.3, -0.847298."""
    rule = {"kind": "entropy", "share": 0.2, "explore": 0.5}
    assert weights(rule, scored([0.5, -0.2, -3.0]), explores=True, floor=0.3) == [[1, 1, 0]]


def ids(rows: list[list[int]]) -> TopK:
    return TopK(ids_RK=np.array(rows, dtype=np.int32), logprobs_RK=float32(np.zeros_like(rows)))


def test_a_token_is_accepted_where_the_teacher_knows_the_students_first_choice() -> None:
    """W8: accepted (1, 0, 1) gives weights (1, 0.01, 1)."""
    item = scored([0.0] * 3)
    student = TokenScores(logprobs_R=item.student_logprobs_R, top_k=ids([[4, 9], [5, 1], [6, 1]]))
    teacher = TokenScores(logprobs_R=item.student_logprobs_R, top_k=ids([[1, 4], [2, 3], [6, 5]]))
    found = weights(
        {"kind": "accepted", "size": 2}, replace(item, student=student, teacher=teacher)
    )
    np.testing.assert_allclose(found, [[1, 0.01, 1]], atol=1e-7)
    fewer = weights(
        {"kind": "accepted", "size": 1}, replace(item, student=student, teacher=teacher)
    )
    np.testing.assert_allclose(fewer, [[0.01, 0.01, 1]], atol=1e-7)


def test_a_sampled_token_is_accepted_with_the_ratio_of_probabilities() -> None:
    gap_R = float32(np.log([0.25] * 20000))
    assert accepted_at_random(gap_R, [0]).mean() == pytest.approx(0.25, abs=0.01)
    assert accepted_at_random(-gap_R, [0]).all()
    np.testing.assert_array_equal(accepted_at_random(gap_R, [1]), accepted_at_random(gap_R, [1]))
    assert (accepted_at_random(gap_R, [1]) != accepted_at_random(gap_R, [2])).any()
    rule = {"kind": "accepted", "rule": "sampled", "weight": 0.5}
    (found,) = weights(rule, scored([5.0, 5.0]))
    assert found == [1.0, 1.0]


def test_a_prefix_is_the_first_tokens() -> None:
    assert weights({"kind": "prefix", "tokens": 2}, scored([0.0] * 3), scored([0.0])) == [
        [1, 1, 0],
        [1],
    ]


def test_tokens_at_which_the_teacher_is_unsure() -> None:
    item = with_entropy([0.8, 0.81, 0.1], side="teacher")
    assert weights({"kind": "teacher_entropy", "above": 0.8}, item) == [[0, 1, 0]]


def test_selectkds_worked_loss() -> None:
    """W8: V = (1, .01, 1), A = (.4, -2, .1), log pi = (-.5, -1, -.1): 0.063333."""
    weights_R: FloatArray = float32([1, 0.01, 1])
    loss = -(weights_R * float32([0.4, -2, 0.1]) * float32([-0.5, -1, -0.1])).mean()
    assert loss == pytest.approx(0.063333, abs=1e-6)
