"""Configuration files of every kind: what one resolves to, and what is wrong with it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megadistill.config import KINDS, ConfigError, RunConfig, kind_of, load, parse
from megadistill.config.loading import read_tree
from megadistill.launch.allowed_paths import check_run_roots
from megadistill.launch.layout import layout
from megadistill.launch.node import gpus_per_node
from megadistill.launch.node_context import NodeContext
from megadistill.preflight import machine_problems
from megadistill.rundir import RunDir

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
    """One report of all that keeps a run from starting: its keys; when these are right, its layout
    and what is on this machine.

    `source` is a configuration or a run directory; `context` is where it would run, by default on the
    nodes that its `cluster` asks for. Without `models` nothing is asked of models, data and disk.
    Raises `ConfigError`.
    """
    folder = Path(source)
    file = RunDir(folder.absolute()).config_file if folder.is_dir() else folder
    config = parse(RunConfig, read_tree(file, overrides), source)
    checks: list[Check] = [check_run_roots, lambda config: check_layout(config, context)]
    problems = list(_raised([*checks, *([also] if also else [])], config))
    if models:
        problems += machine_problems(config)
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
        kind = "run" if Path(path).is_dir() else kind_of(path)
        if kind == "run":
            check_run(path, models=with_models)
        else:
            load(KINDS[kind], path)
    except ValueError as error:
        text = str(error)
        return text if text.startswith(path) else f"{path}: {text}"
    return None
