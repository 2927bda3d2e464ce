"""Divergences over all ids: the teacher ships hidden states, never logits.

Shape suffixes: W weighted rows, S those of one teacher, D hidden size.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megadistill.head import VocabularyHead, forward_kl, jsd, reverse_kl
from megadistill.losses.divergence_rows import LOSS, NATS, ROWS, nothing
from megadistill.types import MicroBatch

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Pair = tuple[VocabularyHead, Tensor]
"""A head and its hidden states."""


def full_vocabulary(
    head: VocabularyHead,
    hidden_WD: Tensor,
    batch: MicroBatch,
    *,
    divergence: Kind,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`sum_t c_t T^2 D(q_t, p_t)` of teacher q and student p at temperature T, in its teachers' rows.

    `forward_kl` is KL(q || p), soft-target distillation (Hinton et al., arXiv:1503.02531).
    `reverse_kl` is KL(p || q), the exact expectation that the policy gradient samples (MiniLLM,
    arXiv:2306.08543, one token at a time on student sequences). `jsd` is GKD's (arXiv:2306.13649)
    Eq. (1), beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p; it vanishes at
    beta = 0 and 1, which mean the forward and the reverse KL. c_t holds the normaliser and, where
    wanted, an importance weight; with T^2 gradients keep their size at any temperature.
    """
    if not batch.teachers:
        total = nothing(head, hidden_WD, batch)
        return total, dict.fromkeys((LOSS, NATS, ROWS), total.detach())
    assert batch.divergence_weights_W is not None
    losses, values = [], []
    for teacher in batch.teachers.values():
        assert teacher.weight_VD is not None
        own = replace(head, weight_VD=teacher.weight_VD, accumulate_into_main_grad=False)
        loss, values_S = _weighted_sum(
            (head, hidden_WD.index_select(0, teacher.rows_S)),
            (own, teacher.hidden_SD),
            # Factors belong in the weights: the head makes gradients before it knows any other.
            temperature**2 * batch.divergence_weights_W[teacher.rows_S],
            (divergence, beta, temperature),
        )
        losses.append(loss)
        values.append(values_S)
    total, values_W = torch.stack(losses).sum(), torch.cat(values)
    return total, {
        LOSS: total.detach(),
        NATS: values_W.sum(),
        ROWS: total.new_tensor(float(len(values_W))),
    }


def _weighted_sum(
    student: Pair, teacher: Pair, weights_S: Tensor, how: tuple[Kind, float, float]
) -> tuple[Tensor, Tensor]:
    """The sum with gradient, and each row's divergence."""
    kind, beta, temperature = how
    if kind == "forward_kl" or (kind == "jsd" and beta == 0.0):
        return forward_kl(*student, *teacher, weights_S, temperature=temperature)
    if kind == "reverse_kl" or beta == 1.0:
        return reverse_kl(*student, *teacher, weights_S, temperature=temperature)
    return jsd(*student, *teacher, weights_S, beta=beta, temperature=temperature)
