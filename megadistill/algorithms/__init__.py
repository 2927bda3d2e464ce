"""Algorithms are small files of decisions; this is the table from configuration to decision."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from megadistill.algorithms.mopd import Camopd, Mopd, make_camopd, make_mopd
from megadistill.algorithms.protocol import Algorithm, OnPolicy, Selection, Supervised
from megadistill.algorithms.raft import Moments, Raft
from megadistill.algorithms.sft import Sft
from megadistill.config.algorithm import CamopdConfig, MopdConfig, RaftConfig
from megadistill.config.schema import RunConfig

__all__ = [
    "Algorithm",
    "Camopd",
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
) -> Mopd | Camopd | Raft | Sft:
    """The decisions that `config.algorithm` names; `state` is what it had learnt."""
    algorithm = config.algorithm
    if isinstance(algorithm, RaftConfig):
        moments = Moments(**state)  # type: ignore[arg-type]
        return Raft(algorithm, config.data, config.batch.size, tokenizer, moments)
    if isinstance(algorithm, CamopdConfig):
        return make_camopd(algorithm, config.batch.size)
    if isinstance(algorithm, MopdConfig):
        return make_mopd(algorithm, config.batch.size)
    return Sft(config.batch.size)
