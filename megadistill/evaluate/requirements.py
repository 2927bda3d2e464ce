"""Checks before any work of an evaluation: files, judges, benchmarks' own code, a sandbox."""

import logging
from collections.abc import Iterator
from pathlib import Path

from megadistill.config import ConfigError, EvaluateConfig, resolve_path
from megadistill.config.evaluate import BenchmarkConfig
from megadistill.evaluate import external, sandbox
from megadistill.evaluate.benchmarks import BENCHMARKS, get_benchmark, recorded
from megadistill.evaluate.protocol import Benchmark, benchmark_file
from megadistill.launch.shards import fingerprint

log = logging.getLogger(__name__)


def benchmark_of(config: EvaluateConfig, name: str) -> Benchmark:
    """The protocol of one of `benchmarks`."""
    return get_benchmark(config.benchmarks[name].kind or name)


def checkout_of(config: EvaluateConfig, name: str) -> Path | None:
    """The directory with its own code."""
    chosen = config.benchmarks[name].checkout
    return None if chosen is None else Path(resolve_path(chosen)).absolute()


def tools_hash(config: EvaluateConfig, name: str) -> str | None:
    """Identifies the benchmark's own code, if it has some."""
    needed, checkout = benchmark_of(config, name).needs, checkout_of(config, name)
    return fingerprint(checkout / needed) if needed and checkout else None


def without_missing(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration without the optional benchmarks whose files are not here.

    Raises `ConfigError` when benchmarks are unknown.
    """
    if unknown := list(_unknown_benchmarks(config)):
        raise ConfigError.listing(config.name, unknown)
    kept = dict(config.benchmarks)
    for name, chosen in config.benchmarks.items():
        try:
            benchmark_file(benchmark_of(config, name), chosen.path)
        except ValueError as error:
            if chosen.optional:
                log.warning("benchmarks.%s is left out: %s", name, error)
                del kept[name]
    return config.model_copy(update={"benchmarks": kept})


def check(config: EvaluateConfig) -> dict[str, Path]:
    """The files of all benchmarks. Raises `ConfigError` with all that is missing, and how to get it."""
    problems = [*_recorded_problems(config), *_external_problems(config)]
    files = {}
    for name, chosen in config.benchmarks.items():
        benchmark = benchmark_of(config, name)
        problems += [
            *_judge_problems(name, benchmark, chosen),
            *_tool_problems(config, name, benchmark),
        ]
        try:
            files[name] = benchmark_file(benchmark, chosen.path)
        except ValueError as error:
            problems.append(f"benchmarks.{name}.{error}")
    if problems:
        raise ConfigError.listing(config.name, problems)
    return files


def _unknown_benchmarks(config: EvaluateConfig) -> Iterator[str]:
    known = ", ".join(BENCHMARKS)
    for name, chosen in config.benchmarks.items():
        if chosen.kind is None and name not in BENCHMARKS:
            yield f"benchmarks.{name}: expected one of {known}, or another name and one as its `kind`"
        elif chosen.kind is not None and chosen.kind not in BENCHMARKS:
            yield f"benchmarks.{name}.kind: found {chosen.kind!r}, expected one of {known}"


def _recorded_problems(config: EvaluateConfig) -> Iterator[str]:
    for system, judged in config.recorded.items():
        for name, file in judged.items():
            try:
                recorded.read_recorded(name, Path(resolve_path(file)))
            except ValueError as error:
                yield f"recorded.{system}.{name}: {error}"


def _external_problems(config: EvaluateConfig) -> Iterator[str]:
    for tool, settings in config.external.items():
        for wanted in (Path(settings.checkout) / external.COMMAND, Path(settings.python)):
            if not wanted.is_file():
                yield (
                    f"external.{tool}: no file {wanted}; expected a checkout of "
                    "github.com/LiveBench/LiveBench, and an interpreter with its packages"
                )


def _judge_problems(name: str, benchmark: Benchmark, chosen: BenchmarkConfig) -> Iterator[str]:
    key, title, judged = f"benchmarks.{name}.judge", benchmark.title, benchmark.judged
    if benchmark.score is None and benchmark.run is None and not chosen.judges:
        if judged is None:
            yield (
                f"benchmarks.{name}: {title} is judged by its own command; use `external` "
                "or `recorded`"
            )
        else:
            yield f"{key}: {title} needs a judge"
    if chosen.judges and judged is None:
        yield f"{key}: {title} takes none"
    if len(chosen.judges) > 1 and not (judged and judged.votes):
        yield f"{key}: {title} takes one"


def _tool_problems(config: EvaluateConfig, name: str, benchmark: Benchmark) -> Iterator[str]:
    if benchmark.needs is None:
        return
    checkout = checkout_of(config, name)
    if checkout is None or not (checkout / benchmark.needs).is_file():
        yield (
            f"benchmarks.{name}.checkout: found {str(checkout)!r}, expected a directory with "
            f"{benchmark.needs}. {benchmark.title}: {benchmark.hint}"
        )
    if config.sandbox == "bubblewrap" and (problem := sandbox.missing()):
        yield f"sandbox: {problem}"
