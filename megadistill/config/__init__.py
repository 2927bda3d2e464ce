"""Configuration: frozen dataclasses, YAML with includes and overrides, all errors at once."""

from megadistill.config.load import (
    ConfigError,
    cache_dir,
    config_schema,
    dump_config,
    load_config,
    parse_config,
    resolve_path,
)
from megadistill.config.schema import RunConfig

__all__ = [
    "ConfigError",
    "RunConfig",
    "cache_dir",
    "config_schema",
    "dump_config",
    "load_config",
    "parse_config",
    "resolve_path",
]
