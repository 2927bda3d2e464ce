"""RAFT's whole loss on a mixed micro-batch, against its definition on dense float64 logits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megadistill.losses import answer_conditioned
from megadistill.types import MicroBatch
from tests.head.dense import assert_near, dense_logprobs
from tests.losses import rows
from tests.losses.rows import NUM_ROWS, STUDENT

TEMPERATURE = 1.5
TAUGHT = torch.arange(NUM_ROWS) < 7
"""Which of the 13 rows have a teacher."""


def make_batch() -> MicroBatch:
    """Where a row has a teacher only its divergence has a weight."""
    batch = rows.with_support(
        rows.bare_rows(STUDENT), side="teacher", temperature=TEMPERATURE, size=5
    )
    assert batch.top_ids_WK is not None
    return replace(
        batch,
        weights_W=batch.weights_W.masked_fill(TAUGHT, 0.0),
        divergence_weights_W=STUDENT.weights_T.masked_fill(~TAUGHT, 0.0),
        top_ids_WK=torch.where(TAUGHT[:, None], batch.top_ids_WK, -1),
    )


def dense_losses(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """L_SFT and L_KL by Eq. (8)-(10), autograd through the student."""
    own_TV = dense_logprobs(STUDENT)
    own_T = own_TV.gather(1, STUDENT.targets_T[:, None])[:, 0]
    sft = -(STUDENT.weights_T * own_T)[~TAUGHT].sum()
    assert batch.top_ids_WK is not None
    kl_T, _, _ = rows.dense_top_k(
        batch.top_ids_WK.clamp(min=0), direction="forward", tail=False, temperature=TEMPERATURE
    )
    return sft, TEMPERATURE**2 * (STUDENT.weights_T * kl_T)[TAUGHT].sum()


@pytest.mark.parametrize("balance", [0.0, 0.3, 4.0])
def test_loss_and_gradient_equal_the_dense_definition(balance: float) -> None:
    batch = make_batch()
    loss, metrics = answer_conditioned(
        STUDENT.head(), STUDENT.hidden_TD, batch, balance=balance, temperature=TEMPERATURE
    )
    torch.autograd.backward(loss)
    found = STUDENT.gradients()
    sft, kl = dense_losses(batch)
    torch.autograd.backward(sft + balance * kl)
    assert_near(found, STUDENT.gradients(), 1e-9)
    assert_near(loss.double(), sft + balance * kl, 1e-6)
    assert_near(metrics["raft/sft"].double(), sft.detach(), 1e-6)
    assert_near(metrics["divergence/loss"].double(), kl.detach(), 1e-6)
    assert int(metrics["divergence/rows"]) == 7
    assert int(metrics["train/rows"]) == 6
    assert 0 < metrics["divergence/student_mass_sum"] < metrics["divergence/rows"]


def test_without_a_teacher_it_is_cross_entropy() -> None:
    loss, metrics = answer_conditioned(
        STUDENT.head(),
        STUDENT.hidden_TD,
        rows.bare_rows(STUDENT),
        balance=4.0,
        temperature=TEMPERATURE,
    )
    own_T = dense_logprobs(STUDENT).gather(1, STUDENT.targets_T[:, None])[:, 0]
    assert_near(loss.double(), -(STUDENT.weights_T * own_T).sum(), 1e-6)
    assert "divergence/loss" not in metrics


@pytest.mark.parametrize("tail_bucket", [False, True])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tail_bucket: bool) -> None:
    batch = make_batch()
    assert batch.top_ids_WK is not None
    own_TV = dense_logprobs(STUDENT, TEMPERATURE).detach()
    same = replace(batch, top_logprobs_WK=own_TV.gather(1, batch.top_ids_WK.clamp(min=0)))
    loss, metrics = answer_conditioned(
        STUDENT.head(),
        STUDENT.hidden_TD,
        replace(same, weights_W=torch.zeros(NUM_ROWS)),
        balance=1.0,
        temperature=TEMPERATURE,
        tail_bucket=tail_bucket,
    )
    assert abs(metrics["divergence/loss"].item()) < 1e-12
    torch.autograd.backward(loss)
    for gradient in STUDENT.gradients():
        assert gradient.abs().max() < 1e-9
