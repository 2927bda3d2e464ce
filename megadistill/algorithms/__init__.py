"""Algorithms are small files of decisions; this is the table from configuration to decision."""

from megadistill.algorithms.mopd import Camopd, Mopd
from megadistill.algorithms.protocol import Algorithm, OnPolicy, Selection, Supervised
from megadistill.algorithms.sft import Sft
from megadistill.config.schema import CamopdConfig, MopdConfig, RunConfig

__all__ = [
    "Algorithm",
    "Camopd",
    "Mopd",
    "OnPolicy",
    "Selection",
    "Sft",
    "Supervised",
    "make_algorithm",
]


def make_algorithm(config: RunConfig) -> Mopd | Camopd | Sft:
    """The decisions that `config.algorithm` names."""
    algorithm = config.algorithm
    if isinstance(algorithm, CamopdConfig):
        return Camopd.of(algorithm, config.batch.size)
    if isinstance(algorithm, MopdConfig):
        return Mopd.of(algorithm, config.batch.size)
    return Sft(config.batch.size)
