"""Configuration files of every kind: what one resolves to, and what is wrong with it."""

from collections.abc import Callable, Sequence
from typing import Any

from megadistill.config import (
    campaign,
    dump_config,
    evaluate,
    load_config,
    prepare,
    refine,
)
from megadistill.launch.layout import layout
from megadistill.launch.node import gpus_per_node
from megadistill.preflight import check_config


def resolved(path: str, overrides: Sequence[str]) -> str:
    """The file with its includes, defaults and overrides, as YAML."""
    if (kind := _kind_of(path)) is not None:
        load, dump = kind
        return dump(load(path, overrides))
    return dump_config(load_config(path, overrides))


def problem_of(path: str, *, with_models: bool) -> str | None:
    """Every problem of the file; `with_models` asks what is on this machine, too."""
    try:
        if (kind := _kind_of(path)) is not None:
            kind[0](path)
            return None
        config = load_config(path)
        layout(config, config.cluster.nodes, gpus_per_node(config))
        if with_models:
            check_config(config)
    except ValueError as error:
        text = str(error)
        return text if text.startswith(path) else f"{path}: {text}"
    return None


def _kind_of(path: str) -> tuple[Callable[..., Any], Callable[[Any], str]] | None:
    """How a file that describes no run is read and shown (any: each kind has its own class)."""
    kinds = (
        (campaign.is_campaign, campaign.load_campaign, campaign.dump_campaign),
        (prepare.is_prepare, prepare.load_prepare, prepare.dump_prepare),
        (evaluate.is_evaluate, evaluate.load_evaluate, evaluate.dump_evaluate),
        (refine.is_refine, refine.load_refine, refine.dump_refine),
    )
    return next(((load, dump) for is_kind, load, dump in kinds if is_kind(path)), None)
