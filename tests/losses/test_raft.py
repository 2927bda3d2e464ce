"""RAFT's whole loss on a mixed micro-batch, against its definition on dense float64 logits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megadistill.losses import answer_conditioned, teacher_top_k
from megadistill.types import MicroBatch
from tests.head.dense import Case, assert_near, dense_logprobs, make_case

TEMPERATURE = 1.5
TAUGHT = torch.tensor([True] * 7 + [False] * 6)
"""Which of the 13 rows have a teacher."""


def make_batch(student: Case, teacher: Case, top_k: int) -> MicroBatch:
    """Rows only; what lies around them is the model's business."""
    top = teacher_top_k(teacher.head(), teacher.hidden_TD, top_k, temperature=TEMPERATURE)
    empty = torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        token_ids_T=empty,
        position_ids_T=empty,
        cu_seqlens=empty,
        rows_W=torch.arange(len(TAUGHT)),
        targets_W=student.targets_T,
        weights_W=student.weights_T,
        sample_ids=(),
        top_ids_WK=torch.where(TAUGHT[:, None], top.ids_WK, -1),
        top_logprobs_WK=torch.where(TAUGHT[:, None], top.logprobs_WK, 0.0),
    )


def dense_losses(student: Case, teacher: Case, top_k: int) -> tuple[Tensor, Tensor]:
    """L_SFT and L_KL by Eq. (8)-(10), autograd through the student."""
    own_TV = dense_logprobs(student)
    own_T = own_TV.gather(1, student.targets_T[:, None])[:, 0]
    sft = -(student.weights_T * own_T)[~TAUGHT].sum()
    q_TV = dense_logprobs(teacher, TEMPERATURE).detach()
    ids_TK = q_TV.topk(top_k).indices
    q_TK = q_TV.gather(1, ids_TK).log_softmax(-1)
    p_TK = dense_logprobs(student, TEMPERATURE).gather(1, ids_TK).log_softmax(-1)
    kl_T = (q_TK.exp() * (q_TK - p_TK)).sum(-1)
    return sft, TEMPERATURE**2 * (student.weights_T * kl_T)[TAUGHT].sum()


@pytest.mark.parametrize("balance", [0.0, 0.3, 4.0])
def test_loss_and_gradient_equal_the_dense_definition(balance: float) -> None:
    student, teacher = make_case(seed=0), make_case(seed=1)
    batch = make_batch(student, teacher, 5)
    loss, metrics = answer_conditioned(
        student.head(), student.hidden_TD, batch, balance=balance, temperature=TEMPERATURE
    )
    torch.autograd.backward(loss)
    found = student.gradients()
    sft, kl = dense_losses(student, teacher, 5)
    torch.autograd.backward(sft + balance * kl)
    assert_near(found, student.gradients(), 1e-9)
    assert_near(loss.double(), sft + balance * kl, 1e-6)
    assert_near(metrics["raft/sft"].double(), sft.detach(), 1e-6)
    assert_near(metrics["raft/kl"].double(), kl.detach(), 1e-6)
    assert int(metrics["raft/kl_rows"]) == 7
    assert 0 < metrics["raft/student_mass_sum"] < metrics["raft/kl_rows"]


def test_without_a_teacher_it_is_cross_entropy() -> None:
    student, teacher = make_case(seed=0), make_case(seed=1)
    batch = make_batch(student, teacher, 5)
    bare = replace(batch, top_ids_WK=None, top_logprobs_WK=None)
    loss, metrics = answer_conditioned(
        student.head(), student.hidden_TD, bare, balance=4.0, temperature=TEMPERATURE
    )
    own_TV = dense_logprobs(student)
    own_T = own_TV.gather(1, student.targets_T[:, None])[:, 0]
    assert_near(loss.double(), -(student.weights_T * own_T).sum(), 1e-6)
    assert "raft/kl" not in metrics


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    student = make_case(seed=0)
    batch = make_batch(student, student, 5)
    _, metrics = answer_conditioned(
        student.head(), student.hidden_TD, batch, balance=1.0, temperature=TEMPERATURE
    )
    assert abs(metrics["raft/kl"].item()) < 1e-12
