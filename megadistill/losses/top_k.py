"""RAFT's answer-conditioned distillation loss: forward KL on the teacher's top-K at a temperature.

Shape suffixes: W weighted rows, D hidden size, K top-K ids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.head import VocabularyHead, logprobs, score


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTopK:
    """What the loss needs of a teacher: its K most probable ids of each row, and how probable."""

    ids_WK: Tensor
    logprobs_WK: Tensor
    """Over the full vocabulary, at `temperature`."""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKStatistics:
    """Per row, without gradient."""

    kl_W: Tensor
    """KL(teacher || student) on the K ids, without the factor T^2."""
    student_mass_W: Tensor
    """Student probability inside the K ids: what lies outside is not penalised."""
    teacher_mass_W: Tensor


def teacher_top_k(
    head: VocabularyHead, hidden_WD: Tensor, top_k: int, *, temperature: float
) -> TeacherTopK:
    """Ask a teacher for its top-K: K ids and numbers a row instead of its whole vocabulary."""
    no_ids_W0 = torch.empty(len(hidden_WD), 0, dtype=torch.int64, device=hidden_WD.device)
    scores = score(head, hidden_WD, no_ids_W0, temperature=temperature, top_k=top_k)
    assert scores.top_ids_TK is not None
    assert scores.top_logprobs_TK is not None
    return TeacherTopK(
        ids_WK=scores.top_ids_TK, logprobs_WK=scores.top_logprobs_TK, temperature=temperature
    )


def topk_temperature_kl(
    head: VocabularyHead,
    hidden_WD: Tensor,
    teacher: TeacherTopK,
    weights_W: Tensor,
    *,
    tail_bucket: bool = False,
) -> tuple[Tensor, TopKStatistics]:
    """`sum_t c_t T^2 KL(q~_t || p~_t)`, with gradient for the student, and statistics.

    RAFT (arXiv:2606.00147) Eq. (8)-(10): q and p are teacher and student at temperature T, q~ and
    p~ are both renormalised on the teacher's top-K; c_t = 1 / (N L_i). With `tail_bucket`, as in
    SDPO (arXiv:2601.20802), nothing is renormalised: all other ids are one further event instead.
    """
    temperature = teacher.temperature
    student_WK = logprobs(head, hidden_WD, teacher.ids_WK, temperature=temperature)
    complete = _with_tail if tail_bucket else _renormalised
    q, p = complete(teacher.logprobs_WK), complete(student_WK)
    kl_W = (q.exp() * (q - p)).sum(-1)
    loss = temperature**2 * (weights_W.to(kl_W.dtype) * kl_W).sum()
    return loss, TopKStatistics(
        kl_W=kl_W.detach(),
        student_mass_W=student_WK.detach().exp().sum(-1),
        teacher_mass_W=teacher.logprobs_WK.exp().sum(-1),
    )


def _renormalised(logprobs_WK: Tensor) -> Tensor:
    return torch.log_softmax(logprobs_WK, -1)


def _with_tail(logprobs_WK: Tensor) -> Tensor:
    """Append log(1 - mass inside), kept finite where rounding leaves no mass outside."""
    inside_W1 = torch.logsumexp(logprobs_WK, -1, keepdim=True)
    inside_W1 = inside_W1.clamp(max=-torch.finfo(logprobs_WK.dtype).eps)
    return torch.cat((logprobs_WK, torch.log(-torch.expm1(inside_W1))), -1)
