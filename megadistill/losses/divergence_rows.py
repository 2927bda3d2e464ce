"""The rows of a micro-batch where a divergence counts, and the names of what is summed over them.

Shape suffixes: W weighted rows, S those of them that count, D hidden size.
"""

import torch
from torch import Tensor

from megadistill.head import VocabularyHead, weighted_nll
from megadistill.types import MicroBatch

LOSS = "divergence/loss"
"""What enters the loss: the sum of weight x T^2 x divergence."""
NATS = "divergence/nats_sum"
"""The sum of the divergences themselves."""
ROWS = "divergence/rows"


def counting_rows(batch: MicroBatch) -> Tensor:
    """bool `[W]`: whether the row's divergence has a weight."""
    if batch.divergence_weights_W is None:
        return torch.zeros_like(batch.rows_W, dtype=torch.bool)
    return batch.divergence_weights_W != 0


def nothing(head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch) -> Tensor:
    """A zero that has the model and the head in its graph, from one row: their collectives, and
    Megatron's hooks on the weight, run for a micro-batch where nothing counts as for others."""
    zero_1 = torch.zeros_like(batch.weights_W[:1])
    return weighted_nll(head, hidden_WD[:1], batch.targets_W[:1], zero_1)[0]
