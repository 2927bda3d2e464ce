"""Configuration: frozen models, YAML with includes and overrides, all errors at once."""

from megadistill.config.campaign import CampaignConfig
from megadistill.config.evaluate import EvaluateConfig
from megadistill.config.kinds import KINDS, kind_of
from megadistill.config.loading import (
    ConfigError,
    cache_dir,
    dump,
    load,
    parse,
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
    "PrepareConfig",
    "RefineConfig",
    "RunConfig",
    "cache_dir",
    "dump",
    "kind_of",
    "load",
    "parse",
    "resolve_path",
]
