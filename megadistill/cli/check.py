"""Reports the problems that keep a run from starting, and those of configuration files of any kind."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megadistill.cli.verbs import check_words
from megadistill.config import KINDS, ConfigError, RunConfig, kind_of, load, parse, read_tree
from megadistill.launch.allowed_paths import check_run_roots
from megadistill.launch.layout import layout
from megadistill.launch.node import gpus_per_node
from megadistill.launch.node_context import NodeContext
from megadistill.preflight import machine_problems
from megadistill.rundir import RunDir


def check_run(
    source: str,
    overrides: Sequence[str] = (),
    context: NodeContext | None = None,
    *,
    models: bool = True,
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
    problems = list(_start_problems(config, context))
    if models:
        problems += machine_problems(config)
    if problems:
        raise ConfigError.listing(source, problems)


def _start_problems(config: RunConfig, context: NodeContext | None) -> Iterator[str]:
    """What directories, layout and the work on exports have against it."""
    for check in (check_run_roots, check_on_export, lambda config: check_layout(config, context)):
        try:
            check(config)
        except ValueError as error:
            yield str(error)


def check_layout(config: RunConfig, context: NodeContext | None) -> None:
    """Raise `ValueError` unless the roles fit on the nodes of `context`, or those `cluster` asks for."""
    nodes = context.num_nodes if context else config.cluster.nodes
    second = context.second_component if context else 0
    layout(config, nodes, gpus_per_node(config), second_component=second)


def check_on_export(config: RunConfig) -> None:
    """Raise `ValueError` for `checkpoint.on_export` with a command line that could not be read."""
    if (work := config.checkpoint.on_export) is not None:
        named = [] if work.config is None else [work.config]
        check_words("checkpoint.on_export", [work.verb, *named, *work.args])


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
