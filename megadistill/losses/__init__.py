"""Losses: short functions over the vocabulary head, each with its formula and its source."""

from megadistill.losses.full_vocabulary import forward_kl_loss, gkd_loss, reverse_kl_loss
from megadistill.losses.raft import answer_conditioned
from megadistill.losses.sampled import cross_entropy, policy_gradient
from megadistill.losses.top_k import (
    TeacherTopK,
    TopKStatistics,
    teacher_top_k,
    topk_temperature_kl,
)

__all__ = [
    "TeacherTopK",
    "TopKStatistics",
    "answer_conditioned",
    "cross_entropy",
    "forward_kl_loss",
    "gkd_loss",
    "policy_gradient",
    "reverse_kl_loss",
    "teacher_top_k",
    "topk_temperature_kl",
]
