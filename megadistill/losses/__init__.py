"""Losses: short functions over the vocabulary head, each with its formula and its source.

Every loss is `(head, hidden_WD, micro-batch) -> (sum over rows, named sums over rows)`; what else it
takes, `functools.partial` fixes.
"""

from megadistill.losses.full_vocabulary import full_vocabulary
from megadistill.losses.joined import answer_conditioned, policy_gradient_and
from megadistill.losses.sampled import cross_entropy, policy_gradient
from megadistill.losses.top_k import top_k

__all__ = [
    "answer_conditioned",
    "cross_entropy",
    "full_vocabulary",
    "policy_gradient",
    "policy_gradient_and",
    "top_k",
]
