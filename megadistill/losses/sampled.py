"""Losses on the tokens of a sequence: policy gradient and cross-entropy, one sum with two readings.

Shape suffixes: W weighted rows, D hidden size. Every loss returns its sum over rows, with gradient,
and named sums without.
"""

from torch import Tensor

from megadistill.head import VocabularyHead, weighted_nll
from megadistill.types import MicroBatch


def policy_gradient(
    head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sampled-token distillation, `-sum_t c_t log pi(y_t)` with frozen c_t.

    CaMOPD (arXiv:2605.27115) Eq. (9), and Eq. (2) for vanilla MOPD: c_t = r_b w_t A_t / (|S_b| T_i)
    with the masked importance weight w_t and the advantage A_t = log pi_T(y_t) - log pi(y_t). The
    weights of the batch are these c_t.
    """
    loss, statistics = weighted_nll(head, hidden_WD, batch.targets_W, batch.weights_W)
    return loss, {
        "train/entropy_sum": statistics.entropy_T.sum(),
        "train/logprob_sum": statistics.logprobs_T.sum(),
        "train/rows": loss.new_tensor(float(len(hidden_WD))),
    }


def cross_entropy(
    head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised fine-tuning, `-sum_t c_t log pi(y_t)` with c_t = 1 / (N T_i).

    The same sum as the policy gradient with every advantage one: RAFT's L_SFT (arXiv:2606.00147,
    normalised like its Eq. 10).
    """
    return policy_gradient(head, hidden_WD, batch)
