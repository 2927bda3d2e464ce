"""The worked numbers of the divergences: W4, W6 and the GKD values of W8."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.head import VocabularyHead, score
from megadistill.losses import full_vocabulary, policy_gradient, top_k
from megadistill.types import MicroBatch, TeacherRows
from tests.head.dense import assert_near

STUDENT_PROBS, TEACHER_PROBS = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
"""W4."""
STUDENT_LOGITS, TEACHER_LOGITS = (2.0, 2.5, 0.5, 1.0, -1.0), (3.0, 2.0, 1.0, 0.0, -1.0)
"""W6."""


def one_row(logits: Any) -> tuple[VocabularyHead, Tensor]:
    """A head of width one whose weight is the row's logits: its gradient is theirs."""
    weight_V1 = torch.as_tensor(logits, dtype=torch.float64)[:, None].requires_grad_()
    head = VocabularyHead(weight_VD=weight_V1, vocab_size=len(logits))
    return head, torch.ones(1, 1, dtype=torch.float64)


def one_batch(target: int = 0, weight: float = 1.0) -> MicroBatch:
    zero_1 = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(
        token_ids_T=zero_1,
        position_ids_T=zero_1,
        cu_seqlens=zero_1,
        rows_W=zero_1,
        targets_W=zero_1 + target,
        weights_W=torch.tensor([weight], dtype=torch.float64),
        divergence_weights_W=torch.ones(1, dtype=torch.float64),
        sample_ids=(0,),
    )


def full(**how: Any) -> Tensor:
    """The divergence of W4's pair, with gradient for the student's logits."""
    teacher, row = one_row(torch.tensor(TEACHER_PROBS).double().log())
    zero_1 = torch.zeros(1, dtype=torch.int64)
    rows = TeacherRows(rows_S=zero_1, hidden_SD=row, weight_VD=teacher.weight_VD.detach())
    student, row = one_row(torch.tensor(STUDENT_PROBS).double().log())
    loss, _ = full_vocabulary(student, row, replace(one_batch(), teachers={"t": rows}), **how)
    torch.autograd.backward(loss)
    assert student.weight_VD.grad is not None
    return torch.cat((loss.detach()[None], student.weight_VD.grad[:, 0]))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"divergence": "forward_kl"}, 0.193794),
        ({"divergence": "reverse_kl"}, 0.223812),
        ({"divergence": "jsd", "beta": 0.0}, 0.193794),
        ({"divergence": "jsd", "beta": 0.5}, 0.050875),
        ({"divergence": "jsd", "beta": 1.0}, 0.223812),
    ],
)
def test_gkd_values(how: dict[str, Any], expected: float) -> None:
    assert full(**how)[0].item() == pytest.approx(expected, abs=1.5e-5)


def test_the_policy_gradient_samples_the_reverse_kl() -> None:
    """W4: E_{y ~ student} of the sampled token's gradient, with weight Delta(y), is the KL's."""
    student, row = one_row(torch.tensor(STUDENT_PROBS).double().log())
    for target, (p, q) in enumerate(zip(STUDENT_PROBS, TEACHER_PROBS, strict=True)):
        gap = float(torch.tensor(q / p).double().log())
        loss, _ = policy_gradient(student, row, one_batch(target, p * gap))
        torch.autograd.backward(loss)
    assert student.weight_VD.grad is not None
    assert_near(student.weight_VD.grad[:, 0], full(divergence="reverse_kl")[1:], 1e-7)


def supported(tail: bool, moved: float = 0.0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """W6: loss, sums, and the gradient for the student's logits; `moved` shifts all logits."""
    no_ids = torch.empty(1, 0, dtype=torch.int64)
    teacher, row = one_row([u + moved for u in TEACHER_LOGITS])
    found = score(teacher, row, no_ids, temperature=1.5, top_k=3)
    assert found.top_ids_TK is not None
    assert found.top_ids_TK.tolist() == [[0, 1, 2]]
    batch = replace(one_batch(), top_ids_WK=found.top_ids_TK, top_logprobs_WK=found.top_logprobs_TK)
    student, row = one_row([v - moved for v in STUDENT_LOGITS])
    loss, sums = top_k(student, row, batch, tail=tail, temperature=1.5)
    torch.autograd.backward(loss)
    assert student.weight_VD.grad is not None
    return loss.detach(), sums, student.weight_VD.grad[:, 0]


def test_raft_s_worked_example_with_its_gradient() -> None:
    loss, sums, gradient_V = supported(tail=False)
    assert loss.item() == pytest.approx(0.232186, abs=5e-7)
    assert sums["divergence/nats_sum"].item() == pytest.approx(0.103194, abs=5e-7)
    assert sums["divergence/teacher_mass_sum"].item() == pytest.approx(0.896652, abs=5e-7)
    assert sums["divergence/student_mass_sum"].item() == pytest.approx(0.809875, abs=5e-7)
    expected = [-0.301321, 0.324145, -0.022824, 0.0, 0.0]
    assert gradient_V.tolist() == pytest.approx(expected, abs=5e-7)


def test_a_tail_by_hand() -> None:
    """Four events: the three ids of W6 unnormalised, and the rest of each distribution."""
    loss, _, _ = supported(tail=True)
    q = torch.tensor([0.504583, 0.259062, 0.133007, 0.103348])
    p = torch.tensor([0.293062, 0.409001, 0.107812, 0.190125])
    expected = 1.5**2 * (q * (q / p).log()).sum().item()
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tail", [False, True])
def test_a_constant_added_to_all_logits_changes_nothing(tail: bool) -> None:
    assert_near(supported(tail), supported(tail, moved=7.0), 1e-12)
