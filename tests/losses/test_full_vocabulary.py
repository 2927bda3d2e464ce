"""Full-vocabulary losses: which divergence each one is."""

import pytest
import torch
from torch import Tensor

from megadistill.head import VocabularyHead
from megadistill.losses import forward_kl_loss, gkd_loss, reverse_kl_loss
from tests.head.dense import assert_near, dense_jsd, dense_kl, dense_logprobs, make_case

STUDENT, TEACHER = make_case(seed=0), make_case(seed=1)
STUDENT_TV, TEACHER_TV = dense_logprobs(STUDENT).detach(), dense_logprobs(TEACHER).detach()


def pairs() -> tuple[tuple[VocabularyHead, Tensor], tuple[VocabularyHead, Tensor]]:
    return (STUDENT.head(), STUDENT.hidden_TD), (TEACHER.head(), TEACHER.hidden_TD)


def test_forward_kl_puts_the_teacher_first() -> None:
    loss, values_W = forward_kl_loss(*pairs(), STUDENT.weights_T)
    expected_W = dense_kl(TEACHER_TV, STUDENT_TV)
    assert_near(values_W, expected_W, 1e-9)
    assert_near(loss.detach(), (STUDENT.weights_T * expected_W).sum(), 1e-9)


def test_reverse_kl_puts_the_student_first() -> None:
    _, values_W = reverse_kl_loss(*pairs(), STUDENT.weights_T)
    assert_near(values_W, dense_kl(STUDENT_TV, TEACHER_TV), 1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gkd_between_its_limits(beta: float) -> None:
    _, values_W = gkd_loss(*pairs(), STUDENT.weights_T, beta=beta)
    assert_near(values_W, dense_jsd(STUDENT_TV, TEACHER_TV, beta), 1e-9)


def test_gkd_at_its_limits() -> None:
    _, at_zero_W = gkd_loss(*pairs(), STUDENT.weights_T, beta=0.0)
    _, at_one_W = gkd_loss(*pairs(), STUDENT.weights_T, beta=1.0)
    assert_near(at_zero_W, dense_kl(TEACHER_TV, STUDENT_TV), 1e-9)
    assert_near(at_one_W, dense_kl(STUDENT_TV, TEACHER_TV), 1e-9)


def test_reverse_kl_is_what_the_policy_gradient_samples() -> None:
    """E_{y ~ student}[(log p - log q)(y) grad log p(y)] is the gradient of KL(student || teacher)."""
    loss, _ = reverse_kl_loss(*pairs(), STUDENT.weights_T)
    torch.autograd.backward(loss)
    found = STUDENT.gradients()
    logprobs_TV = dense_logprobs(STUDENT)
    frozen_TV = logprobs_TV.detach()
    expectation_T = (frozen_TV.exp() * (frozen_TV - TEACHER_TV) * logprobs_TV).sum(-1)
    torch.autograd.backward((STUDENT.weights_T * expectation_T).sum())
    assert_near(found, STUDENT.gradients(), 1e-9)
