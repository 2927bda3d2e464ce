"""Losses: short functions over the vocabulary head, each with its formula and its source."""

from megadistill.losses.sampled import cross_entropy, policy_gradient

__all__ = ["cross_entropy", "policy_gradient"]
