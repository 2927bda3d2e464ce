"""The loss that SFT, MOPD and CaMOPD share: everything that differs is in the token weights."""

from collections.abc import Mapping

import torch

from megadistill.head import VocabularyHead, weighted_nll
from megadistill.types import MicroBatch


def weighted_token_loss(
    head: VocabularyHead, hidden_WD: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """-sum_t weight_t log pi(y_t), a sum over rows; with 1/(N T) as weight it is cross-entropy.

    With CaMOPD's weights its gradient is that of Eq. (9): advantage and importance weight carry
    none. The named sums are over rows too: `entropy` in nats, and `rows`.
    """
    loss, statistics = weighted_nll(head, hidden_WD, micro.targets_W, micro.weights_W)
    rows = torch.tensor(float(len(micro.targets_W)), device=hidden_WD.device)
    return loss, {"entropy": statistics.entropy_T.sum(), "rows": rows}
