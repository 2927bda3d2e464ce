"""Configuration: frozen models, YAML with includes and overrides, all errors at once.

This is the table of the kinds of files.
"""

from pathlib import Path
from typing import Literal

from megadistill.config.campaign import CampaignConfig
from megadistill.config.evaluate import EvaluateConfig
from megadistill.config.loading import (
    ConfigError,
    cache_dir,
    dump,
    first_day,
    json_schema,
    load,
    parse,
    read_tree,
    resolve_path,
)
from megadistill.config.prepare import PrepareConfig
from megadistill.config.refine import RefineConfig
from megadistill.config.schema import RunConfig

__all__ = [
    "KINDS",
    "CampaignConfig",
    "ConfigError",
    "EvaluateConfig",
    "KindName",
    "PrepareConfig",
    "RefineConfig",
    "RunConfig",
    "cache_dir",
    "dump",
    "first_day",
    "json_schema",
    "kind_of",
    "load",
    "parse",
    "read_tree",
    "resolve_path",
]

KindName = Literal["run", "eval", "refine", "prepare", "campaign"]

KINDS: dict[
    KindName, type[RunConfig | EvaluateConfig | RefineConfig | PrepareConfig | CampaignConfig]
] = {
    "run": RunConfig,
    "eval": EvaluateConfig,
    "refine": RefineConfig,
    "prepare": PrepareConfig,
    "campaign": CampaignConfig,
}
"""Name of a kind -> what its files say."""


def kind_of(path: str | Path) -> KindName:
    """The kind that most settings of a file are of; a run in case of doubt."""
    settings = read_tree(path).keys()
    return max(KINDS, key=lambda kind: len(settings & KINDS[kind].model_fields.keys()))
