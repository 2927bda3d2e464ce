"""Full-vocabulary distillation losses: the teacher ships hidden states, never logits.

Shape suffixes: W weighted rows, D hidden size. A row's weight holds its normaliser and, where
sequences come from another policy, its importance weight.
"""

from torch import Tensor

from megadistill.head import VocabularyHead, forward_kl, jsd, reverse_kl


def forward_kl_loss(
    student: tuple[VocabularyHead, Tensor],
    teacher: tuple[VocabularyHead, Tensor],
    weights_W: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`sum_t c_t KL(q_t || p_t)` of teacher q and student p: soft-target distillation.

    Hinton et al. (arXiv:1503.02531) up to the teacher's entropy; multiply c_t by T^2 for their
    scale. Returns the sum with gradient and the divergence of each row.
    """
    return forward_kl(*student, *teacher, weights_W, temperature=temperature)


def reverse_kl_loss(
    student: tuple[VocabularyHead, Tensor],
    teacher: tuple[VocabularyHead, Tensor],
    weights_W: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`sum_t c_t KL(p_t || q_t)`: the exact expectation that the policy gradient samples.

    MiniLLM (arXiv:2306.08543), one token at a time on student sequences.
    """
    return reverse_kl(*student, *teacher, weights_W, temperature=temperature)


def gkd_loss(
    student: tuple[VocabularyHead, Tensor],
    teacher: tuple[VocabularyHead, Tensor],
    weights_W: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`sum_t c_t JSD_beta(q_t, p_t)`, GKD (arXiv:2306.13649) Eq. (1).

    JSD_beta = beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. Its limits
    vanish with beta and 1 - beta; GKD then means the forward and the reverse KL.
    """
    if beta == 0.0:
        return forward_kl_loss(student, teacher, weights_W, temperature=temperature)
    if beta == 1.0:
        return reverse_kl_loss(student, teacher, weights_W, temperature=temperature)
    return jsd(*student, *teacher, weights_W, beta=beta, temperature=temperature)
