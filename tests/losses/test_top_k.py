"""RAFT's top-K temperature KL: the worked example W6, its limits, and the dense oracle."""

import pytest
import torch
from torch import Tensor

from megadistill.head import VocabularyHead
from megadistill.losses import teacher_top_k, topk_temperature_kl
from tests.head.dense import assert_near, dense_kl, dense_logprobs, make_case

TEACHER_LOGITS = [3.0, 2.0, 1.0, 0.0, -1.0]
STUDENT_LOGITS = [2.0, 2.5, 0.5, 1.0, -1.0]


def one_row(logits: list[float]) -> tuple[VocabularyHead, Tensor]:
    """A head of width one whose weight is the row's logits: its gradient is theirs."""
    weight_V1 = torch.tensor(logits, dtype=torch.float64)[:, None].requires_grad_()
    head = VocabularyHead(weight_VD=weight_V1, vocab_size=len(logits))
    return head, torch.ones(1, 1, dtype=torch.float64)


def test_worked_example_with_its_gradient() -> None:
    student, row = one_row(STUDENT_LOGITS)
    teacher = teacher_top_k(*one_row(TEACHER_LOGITS), 3, temperature=1.5)
    assert teacher.ids_WK.tolist() == [[0, 1, 2]]
    loss, statistics = topk_temperature_kl(student, row, teacher, torch.ones(1))
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(0.232186, abs=5e-7)
    assert statistics.kl_W.item() == pytest.approx(0.103194, abs=5e-7)
    assert statistics.teacher_mass_W.item() == pytest.approx(0.896652, abs=5e-7)
    assert statistics.student_mass_W.item() == pytest.approx(0.809875, abs=5e-7)
    assert student.weight_VD.grad is not None
    gradient = student.weight_VD.grad[:, 0].tolist()
    assert gradient == pytest.approx([-0.301321, 0.324145, -0.022824, 0.0, 0.0], abs=5e-7)


def test_tail_bucket_by_hand() -> None:
    """Four events: the three ids of W6 unnormalised, and the rest of each distribution."""
    student, row = one_row(STUDENT_LOGITS)
    teacher = teacher_top_k(*one_row(TEACHER_LOGITS), 3, temperature=1.5)
    loss, _ = topk_temperature_kl(student, row, teacher, torch.ones(1), tail_bucket=True)
    q = torch.tensor([0.504583, 0.259062, 0.133007, 0.103348])
    p = torch.tensor([0.293062, 0.409001, 0.107812, 0.190125])
    expected = 1.5**2 * (q * (q / p).log()).sum().item()
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tail_bucket", [False, True])
def test_all_ids_give_the_full_vocabulary_kl(tail_bucket: bool) -> None:
    student, teacher = make_case(seed=0), make_case(seed=1)
    ids = teacher_top_k(teacher.head(), teacher.hidden_TD, 37, temperature=1.5)
    loss, statistics = topk_temperature_kl(
        student.head(), student.hidden_TD, ids, student.weights_T, tail_bucket=tail_bucket
    )
    torch.autograd.backward(loss)
    found = student.gradients()
    expected_W = dense_kl(dense_logprobs(teacher, 1.5).detach(), dense_logprobs(student, 1.5))
    torch.autograd.backward(1.5**2 * (student.weights_T * expected_W).sum())
    assert_near(statistics.kl_W, expected_W.detach(), 1e-9)
    assert_near(found, student.gradients(), 1e-9)


@pytest.mark.parametrize("tail_bucket", [False, True])
def test_student_as_teacher_gives_zero(tail_bucket: bool) -> None:
    case = make_case(dtype=torch.float32)
    teacher = teacher_top_k(case.head(), case.hidden_TD, 5, temperature=1.5)
    loss, _ = topk_temperature_kl(
        case.head(), case.hidden_TD, teacher, case.weights_T, tail_bucket=tail_bucket
    )
    torch.autograd.backward(loss)
    assert abs(loss.item()) < 1e-6
    for gradient in case.gradients():
        assert gradient.abs().max() < 1e-6


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    teacher = teacher_top_k(*one_row(TEACHER_LOGITS), 3, temperature=1.5)
    moved = teacher_top_k(*one_row([u + 7.0 for u in TEACHER_LOGITS]), 3, temperature=1.5)
    loss, _ = topk_temperature_kl(*one_row(STUDENT_LOGITS), teacher, torch.ones(1))
    same, _ = topk_temperature_kl(*one_row([v - 5.0 for v in STUDENT_LOGITS]), moved, torch.ones(1))
    assert_near(loss, same, 1e-12)


@pytest.mark.parametrize("tail_bucket", [False, True])
def test_gradcheck(tail_bucket: bool) -> None:
    case = make_case(num_tokens=3, hidden_size=3, vocab_size=6, num_padding=1)
    other = make_case(num_tokens=3, hidden_size=4, vocab_size=6, num_padding=0, seed=1)
    teacher = teacher_top_k(other.head(), other.hidden_TD, 4, temperature=1.5)

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        head = VocabularyHead(weight_VD=weight_VD, vocab_size=6, chunk_tokens=2)
        return topk_temperature_kl(
            head, hidden_TD, teacher, case.weights_T, tail_bucket=tail_bucket
        )[0]

    assert torch.autograd.gradcheck(loss, (case.hidden_TD, case.weight_VD))
