"""Policy gradient and cross-entropy on a packed micro-batch."""

import pytest
import torch
from torch import Tensor

from megadistill.head import VocabularyHead
from megadistill.losses import cross_entropy, policy_gradient
from megadistill.types import MicroBatch
from tests.head.dense import dense_entropy, dense_logprobs, make_case

# The worked example W3: two sequences, three and two response tokens.
TRAIN = [-0.5, -1.0, -2.0, -0.7, -0.2]
ROLLOUT = [-0.6, -1.0, -1.0, -0.7, -0.2]
TEACHER = [-0.2, -1.5, -0.5, -0.3, -0.9]
LENGTHS = [3, 3, 3, 2, 2]


def batch_of(targets_W: Tensor, weights_W: Tensor) -> MicroBatch:
    num_rows = len(targets_W)
    return MicroBatch(
        token_ids_T=targets_W,
        position_ids_T=torch.arange(num_rows),
        cu_seqlens=torch.tensor([0, num_rows], dtype=torch.int32),
        rows_W=torch.arange(num_rows),
        targets_W=targets_W,
        weights_W=weights_W,
        sample_ids=(0,),
    )


def rows_with_logprobs(logprobs: list[float]) -> tuple[VocabularyHead, Tensor]:
    """Two ids and one hidden unit a row: id 0 has just the log-probability that is asked for."""
    values_W = torch.tensor(logprobs, dtype=torch.float64)
    hidden_WD = torch.diag(values_W - torch.log(-torch.expm1(values_W))).requires_grad_()
    weight_VD = torch.stack((torch.ones_like(values_W), torch.zeros_like(values_W)))
    return VocabularyHead(weight_VD=weight_VD, vocab_size=2), hidden_WD


def test_policy_gradient_of_the_worked_example() -> None:
    weights: list[float] = []
    for train, rollout, teacher, length in zip(TRAIN, ROLLOUT, TEACHER, LENGTHS, strict=True):
        ratio = float(torch.tensor(train - rollout, dtype=torch.float64).exp())
        kept = ratio if 0.5 <= ratio <= 2.0 else 0.0
        weights.append(kept * (teacher - train) / (2 * length))
    head, hidden_WD = rows_with_logprobs(TRAIN)
    batch = batch_of(torch.zeros(5, dtype=torch.int64), torch.tensor(weights, dtype=torch.float64))
    loss, metrics = policy_gradient(head, hidden_WD, batch)
    assert loss.item() == pytest.approx(-0.020704, abs=5e-7)
    assert metrics["train/rows"] == 5
    assert metrics["train/logprob_sum"].item() == pytest.approx(sum(TRAIN), abs=1e-9)
    torch.autograd.backward(loss)
    assert hidden_WD.grad is not None
    # d loss / d z_0 = d loss / d log pi (1 - pi), and d loss / d log pi is the example's.
    remaining_W = -torch.tensor(TRAIN, dtype=torch.float64).expm1()
    found = (hidden_WD.grad.diag() / remaining_W).tolist()
    assert found == pytest.approx([-0.055259, 0.083333, 0.0, -0.1, 0.175], abs=5e-7)


def test_cross_entropy_is_torchs() -> None:
    case = make_case()
    batch = batch_of(case.targets_T, torch.full((13,), 1 / 13))
    loss, metrics = cross_entropy(case.head(), case.hidden_TD, batch)
    logits_TV = case.hidden_TD @ case.weight_VD[: case.vocab_size].t()
    expected = torch.nn.functional.cross_entropy(logits_TV, case.targets_T)
    torch.testing.assert_close(loss, expected)
    entropy = dense_entropy(dense_logprobs(case)).sum().detach()
    torch.testing.assert_close(metrics["train/entropy_sum"], entropy)
