"""RAFT's training loss: cross-entropy on refined answers plus distillation on own responses.

Shape suffixes: W weighted rows, D hidden size, K top-K ids.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megadistill.head import VocabularyHead
from megadistill.losses.sampled import cross_entropy
from megadistill.losses.top_k import TeacherTopK, topk_temperature_kl
from megadistill.types import MicroBatch


def answer_conditioned(
    head: VocabularyHead,
    hidden_WD: Tensor,
    batch: MicroBatch,
    *,
    balance: float,
    temperature: float,
    tail_bucket: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`L_SFT + lambda L_KL`, RAFT (arXiv:2606.00147) Eq. (10) and (12); `balance` is lambda.

    Rows with a teacher's top K are tokens of the student's own responses and enter L_KL, the others
    are answer tokens and enter L_SFT. The metrics hold both losses, so `raft/sft` and `raft/kl` do
    not depend on `balance`.
    """
    loss = hidden_WD.new_zeros((), dtype=torch.float32)
    metrics: dict[str, Tensor] = {}
    taught_W = _taught(batch)
    if not taught_W.all():
        answers = replace(
            batch, targets_W=batch.targets_W[~taught_W], weights_W=batch.weights_W[~taught_W]
        )
        sft, metrics = cross_entropy(head, hidden_WD[~taught_W], answers)
        loss = loss + sft
        metrics["raft/sft"] = sft.detach()
    if taught_W.any():
        assert batch.top_ids_WK is not None
        assert batch.top_logprobs_WK is not None
        teacher = TeacherTopK(
            ids_WK=batch.top_ids_WK[taught_W],
            logprobs_WK=batch.top_logprobs_WK[taught_W],
            temperature=temperature,
        )
        kl, statistics = topk_temperature_kl(
            head,
            hidden_WD[taught_W],
            teacher,
            batch.weights_W[taught_W],
            tail_bucket=tail_bucket,
        )
        loss = loss + balance * kl
        metrics |= {
            "raft/kl": kl.detach(),
            "raft/student_mass_sum": statistics.student_mass_W.sum(),
            "raft/teacher_mass_sum": statistics.teacher_mass_W.sum(),
            "raft/kl_rows": taught_W.sum(),
        }
    return loss, metrics


def _taught(batch: MicroBatch) -> Tensor:
    if batch.top_ids_WK is None:
        return torch.zeros_like(batch.rows_W, dtype=torch.bool)
    return batch.top_ids_WK[:, 0] >= 0
