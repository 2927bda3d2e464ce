"""The fused vocabulary head: log-probs, statistics and loss gradients without `[T, V]` logits."""

from megadistill.head.divergence import Divergences, divergences, forward_kl, jsd, reverse_kl
from megadistill.head.logprobs import logprobs
from megadistill.head.nll import NllStatistics, weighted_nll
from megadistill.head.score import HeadScores, score
from megadistill.head.vocabulary import VocabularyHead

__all__ = [
    "Divergences",
    "HeadScores",
    "NllStatistics",
    "VocabularyHead",
    "divergences",
    "forward_kl",
    "jsd",
    "logprobs",
    "reverse_kl",
    "score",
    "weighted_nll",
]
