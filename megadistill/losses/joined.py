"""Sums of a loss on the sampled tokens and a divergence from a teacher.

Shape suffixes: W weighted rows, D hidden size.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megadistill.head import VocabularyHead
from megadistill.losses.divergence_rows import counting_rows
from megadistill.losses.sampled import cross_entropy, policy_gradient
from megadistill.losses.top_k import top_k
from megadistill.types import MicroBatch

Divergence = Callable[[VocabularyHead, Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]


def policy_gradient_and(
    head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch, *, divergence: Divergence
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient on every row plus the divergence on the rows that have a weight for it.

    Entropy-aware OPD (arXiv:2603.07079) adds a forward KL on the teacher's top 16 where the teacher
    is unsure.
    """
    sampled, named = policy_gradient(head, hidden_WD, batch)
    compared, more = divergence(head, hidden_WD, batch)
    return sampled + compared, named | more


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

    Rows with a divergence weight are tokens of the student's own responses and enter L_KL, the
    others are answer tokens and enter L_SFT. The metrics hold both losses, so `raft/sft` and
    `divergence/loss` do not depend on `balance`.
    """
    loss = hidden_WD.new_zeros((), dtype=torch.float32)
    metrics: dict[str, Tensor] = {}
    taught_W = counting_rows(batch)
    if not taught_W.all():
        answers = replace(
            batch, targets_W=batch.targets_W[~taught_W], weights_W=batch.weights_W[~taught_W]
        )
        sft, metrics = cross_entropy(head, hidden_WD[~taught_W], answers)
        loss = loss + sft
        metrics["raft/sft"] = sft.detach()
    if taught_W.any():
        kl, more = top_k(head, hidden_WD, batch, tail=tail_bucket, temperature=temperature)
        loss = loss + balance * kl
        metrics |= more
    return loss, metrics
