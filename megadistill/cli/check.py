"""Reports the problems that keep a run from starting, and those of configuration files of any kind."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from megadistill.cli.verbs import check_words
from megadistill.config import (
    KINDS,
    ConfigError,
    EvaluateConfig,
    PrepareConfig,
    RefineConfig,
    RunConfig,
    kind_of,
    load,
    parse,
    read_tree,
)
from megadistill.config.fields import Config
from megadistill.config.refine import ChatModelConfig, ServedConfig
from megadistill.config.rows import Location
from megadistill.data.files import files_of
from megadistill.data.sources import check_pool
from megadistill.launch.allowed_paths import check_run_roots
from megadistill.launch.layout import layout
from megadistill.launch.node import gpus_per_node
from megadistill.launch.node_context import NodeContext
from megadistill.preflight import check_model, machine_problems, used_pools
from megadistill.resolve import resolve
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
    run = RunDir(folder.absolute()) if folder.is_dir() else RunDir.of(config)
    if models and not run.has_done(config):
        # What has to be read whole is read when all the rest is right.
        problems += machine_problems(config)
        pools = config.data.pools
        checks = [partial(check_pool, pools[name], name) for name in used_pools(config)]
        problems = problems or list(_problems(checks))
    if problems:
        raise ConfigError.listing(source, problems)


def _start_problems(config: RunConfig, context: NodeContext | None) -> Iterator[str]:
    """What directories, layout and the work on exports have against it."""
    checks = (check_run_roots, check_on_export, partial(check_layout, context=context))
    return _problems(partial(check, config) for check in checks)


def _problems(checks: Iterable[Callable[[], object]]) -> Iterator[str]:
    """What those say that fail."""
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def _openings(config: Config) -> Iterator[Callable[[], object]]:
    """Opens what an evaluation, a refinement or a preparation reads, one after the other."""
    from megadistill.evaluate import requirements
    from megadistill.prepare import files

    match config:
        case EvaluateConfig():
            yield from _served("systems", config.systems)
            yield from _served("models", config.models)
            yield partial(requirements.check, config)
        case RefineConfig():
            place = Location("data", config.input.path)
            yield partial(files_of, place, key="input.path")
            yield partial(_open_model, "rewrite.model", config.rewrite.model)
            yield from _served("models", config.models)
        case PrepareConfig():
            yield from (
                partial(files.files_of, source) for source in config.recipe.sources.values()
            )
            if config.tokenizer is not None:
                yield partial(_open_model, "tokenizer", config.tokenizer)


def _served(section: str, models: Mapping[str, ChatModelConfig]) -> Iterator[Callable[[], object]]:
    for name, model in models.items():
        if isinstance(model, ServedConfig):
            yield partial(_open_model, f"{section}.{name}.path", model.path)


def _open_model(key: str, path: str) -> None:
    directory = resolve("model", path, key=key, download=False)
    try:
        check_model(directory)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def check_layout(config: RunConfig, context: NodeContext | None = None) -> None:
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
            config = load(KINDS[kind], path)
            if with_models and (problems := list(_problems(_openings(config)))):
                raise ConfigError.listing(path, problems)
    except ValueError as error:
        text = str(error)
        return text if text.startswith(path) else f"{path}: {text}"
    return None
