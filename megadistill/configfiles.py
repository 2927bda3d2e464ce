"""Configuration files of every kind: what one resolves to, and what is wrong with it."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megadistill.config import (
    ConfigError,
    RunConfig,
    campaign,
    dump_config,
    evaluate,
    load_config,
    prepare,
    refine,
)
from megadistill.config.load import read_settings, read_tree
from megadistill.launch.allowed_paths import check_run_roots
from megadistill.launch.layout import layout
from megadistill.launch.node import gpus_per_node
from megadistill.launch.node_context import NodeContext
from megadistill.preflight import machine_problems
from megadistill.rundir import RunDir


def resolved(path: str, overrides: Sequence[str]) -> str:
    """The file with its includes, defaults and overrides, as YAML."""
    if (kind := _kind_of(path)) is not None:
        load, dump = kind
        return dump(load(path, overrides))
    return dump_config(load_config(path, overrides))


LAYOUT = ("cluster", "device", "parallel", "rollout")
"""Sections that say who runs where."""

Check = Callable[[RunConfig], object]
"""Raises `ValueError` when something is wrong."""


def check_run(
    source: str,
    overrides: Sequence[str] = (),
    context: NodeContext | None = None,
    *,
    models: bool = True,
    also: Check | None = None,
) -> None:
    """One report of all that keeps a run from starting: keys, layout, and what is on this machine.

    `source` is a configuration or a run directory; `context` is where it would run, by default on the
    nodes that its `cluster` asks for. Without `models` nothing is asked of models, data and disk.
    Raises `ConfigError`.
    """
    folder = Path(source)
    file = RunDir(folder.absolute()).config_file if folder.is_dir() else folder
    reading = read_settings(read_tree(file, overrides))
    problems = reading.problems
    if reading.config is not None:
        checks: list[Check] = [check_run_roots, *([also] if also else [])]
        if not any(key.split(".")[0] in LAYOUT for key in reading.at_fault):
            checks.append(lambda config: check_layout(config, context))
        further = list(_raised(checks, reading.config))
        if models:
            further += machine_problems(reading.config)
        # What follows from the default that took the place of a wrong setting is no news.
        wrong = [re.compile(rf"(?<![\w.]){re.escape(key)}\b") for key in reading.at_fault]
        problems += [text for text in further if not any(key.search(text) for key in wrong)]
    if problems:
        raise ConfigError.listing(source, problems)


def check_layout(config: RunConfig, context: NodeContext | None) -> None:
    """Raise `ValueError` unless the roles fit on the nodes of `context`, or those `cluster` asks for."""
    nodes, second = config.cluster.nodes, 0
    if context is not None:
        nodes, second = context.num_nodes, context.second_component
    layout(config, nodes, gpus_per_node(config), second_component=second)


def _raised(checks: Sequence[Check], config: RunConfig) -> Iterator[str]:
    for check in checks:
        try:
            check(config)
        except ValueError as error:
            yield str(error)


def problem_of(path: str, *, with_models: bool) -> str | None:
    """Every problem of the file; `with_models` asks what is on this machine, too."""
    try:
        if not Path(path).is_dir() and (kind := _kind_of(path)) is not None:
            kind[0](path)
        else:
            check_run(path, models=with_models)
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
