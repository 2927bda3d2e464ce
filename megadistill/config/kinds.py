"""The kinds of configuration files, and how a file tells which it is."""

from pathlib import Path

from megadistill.config.campaign import CampaignConfig
from megadistill.config.evaluate import EvaluateConfig
from megadistill.config.loading import read_tree
from megadistill.config.prepare import PrepareConfig
from megadistill.config.refine import RefineConfig
from megadistill.config.schema import RunConfig

KINDS: dict[
    str, type[RunConfig | EvaluateConfig | RefineConfig | PrepareConfig | CampaignConfig]
] = {
    "run": RunConfig,
    "eval": EvaluateConfig,
    "refine": RefineConfig,
    "prepare": PrepareConfig,
    "campaign": CampaignConfig,
}
"""Name of a kind -> what its files say."""

_OWN_SECTIONS = {
    "benchmarks": "eval",
    "rewrite": "refine",
    "recipe": "prepare",
    "stages": "campaign",
}
"""Sections that every file of a kind has, and no file of another."""


def kind_of(path: str | Path) -> str:
    """The kind of a file, by its sections; a run where it has none that others have."""
    tree = read_tree(path)
    return next((kind for section, kind in _OWN_SECTIONS.items() if section in tree), "run")
