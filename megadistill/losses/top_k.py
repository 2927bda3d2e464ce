"""A divergence over K ids a row, the teacher's most probable ones or the student's.

Shape suffixes: S rows that count, D hidden size, K ids.
"""

from typing import Literal

import torch
from torch import Tensor

from megadistill.head import VocabularyHead, logprobs
from megadistill.losses.divergence_rows import LOSS, NATS, ROWS, counting_rows, nothing
from megadistill.types import MicroBatch

STUDENT_MASS, TEACHER_MASS = "divergence/student_mass_sum", "divergence/teacher_mass_sum"
"""Probability inside the K ids; without a tail, what the student has outside is not penalised."""


def top_k(
    head: VocabularyHead,
    hidden_WD: Tensor,
    batch: MicroBatch,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    tail: bool = False,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`sum_t c_t T^2 KL(q~_t || p~_t)`, or in reverse, on each row's K ids.

    q and p are teacher and student at temperature T, q~ and p~ both renormalised on the ids: RAFT
    (arXiv:2606.00147) Eq. (8)-(10) with the teacher's top-K, Fu et al. (arXiv:2603.25562) in
    reverse, Li et al. (arXiv:2604.13016) with the student's. With `tail` (SDPO, arXiv:2601.20802)
    nothing is renormalised: all other ids are one further event instead. The batch has the ids and
    the teacher's log-probabilities there; c_t is its divergence weight.
    """
    counting_W = counting_rows(batch)
    if not counting_W.any():
        total = nothing(head, hidden_WD, batch)
        return total, dict.fromkeys((LOSS, NATS, STUDENT_MASS, TEACHER_MASS, ROWS), total.detach())
    assert batch.divergence_weights_W is not None
    assert batch.top_ids_WK is not None
    assert batch.top_logprobs_WK is not None
    teacher_SK = batch.top_logprobs_WK[counting_W]
    student_SK = logprobs(
        head, hidden_WD[counting_W], batch.top_ids_WK[counting_W], temperature=temperature
    )
    complete = _with_tail if tail else _renormalised
    left, right = complete(teacher_SK), complete(student_SK)
    if direction == "reverse":
        left, right = right, left
    kl_S = (left.exp() * (left - right)).sum(-1)
    weights_S = batch.divergence_weights_W[counting_W].to(kl_S.dtype)
    total = temperature**2 * (weights_S * kl_S).sum()
    return total, {
        LOSS: total.detach(),
        NATS: kl_S.detach().sum(),
        STUDENT_MASS: student_SK.detach().exp().sum(-1).sum(),
        TEACHER_MASS: teacher_SK.exp().sum(-1).sum(),
        ROWS: counting_W.sum(),
    }


def _renormalised(logprobs_SK: Tensor) -> Tensor:
    return torch.log_softmax(logprobs_SK, -1)


def _with_tail(logprobs_SK: Tensor) -> Tensor:
    """Append log(1 - mass inside), kept finite where rounding leaves no mass outside."""
    inside_S1 = torch.logsumexp(logprobs_SK, -1, keepdim=True)
    inside_S1 = inside_S1.clamp(max=-torch.finfo(logprobs_SK.dtype).eps)
    return torch.cat((logprobs_SK, torch.log(-torch.expm1(inside_S1))), -1)
