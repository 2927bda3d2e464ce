"""Algorithms are small files of decisions, which their configurations name."""

import importlib
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from megadistill.algorithms.mopd import Mopd
from megadistill.algorithms.protocol import Algorithm, OnPolicy, Selection, Supervised
from megadistill.algorithms.raft import Raft
from megadistill.algorithms.sft import Sft
from megadistill.config.schema import RunConfig

__all__ = [
    "Algorithm",
    "Mopd",
    "OnPolicy",
    "Raft",
    "Selection",
    "Sft",
    "Supervised",
    "make_algorithm",
]


def make_algorithm(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, state: Mapping[str, float]
) -> OnPolicy | Supervised:
    """The decisions that `config.algorithm` names; `state` is what they had learnt."""
    module = importlib.import_module(f"{__name__}.{config.algorithm.decisions}")
    made: OnPolicy | Supervised = module.make(config, tokenizer, state)
    return made
