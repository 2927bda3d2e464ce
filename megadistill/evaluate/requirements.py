"""What an evaluation needs before any work: files, judges, code of the benchmarks' own, a sandbox."""

import logging
from dataclasses import replace
from pathlib import Path

from megadistill.config import resolve_path
from megadistill.config.evaluate import BenchmarkConfig, EvaluateConfig
from megadistill.evaluate import external, sandbox
from megadistill.evaluate.benchmarks import get_benchmark, recorded
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


def tools_identity(config: EvaluateConfig, name: str) -> dict[str, str]:
    """The part of a score's identity that is the benchmark's own code."""
    needed, checkout = benchmark_of(config, name).needs, checkout_of(config, name)
    return {"tools": fingerprint(checkout / needed)} if needed and checkout else {}


def without_missing(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration without the optional benchmarks whose files are not here."""
    missing = {
        name: file
        for name, chosen in config.benchmarks.items()
        if chosen.optional
        and not (file := benchmark_file(benchmark_of(config, name), chosen.path)).is_file()
    }
    for name, file in missing.items():
        log.warning("benchmarks.%s is left out: no file %s", name, file)
    kept = {name: chosen for name, chosen in config.benchmarks.items() if name not in missing}
    return replace(config, benchmarks=kept) if missing else config


def check(config: EvaluateConfig) -> dict[str, Path]:
    """The files of all benchmarks. Raises `ValueError` saying what is missing, and how to get it."""
    for judged in config.recorded.values():
        for name, file in judged.items():
            recorded.read_recorded(name, Path(resolve_path(file)))
    for tool, settings in config.external.items():
        for wanted in (Path(settings.checkout) / external.COMMAND, Path(settings.python)):
            if not wanted.is_file():
                raise ValueError(
                    f"external.{tool}: no file {wanted}; expected a checkout of "
                    "github.com/LiveBench/LiveBench, and an interpreter with its packages"
                )
    files = {}
    for name, chosen in config.benchmarks.items():
        benchmark = benchmark_of(config, name)
        _check_judges(name, benchmark, chosen)
        _check_tools(config, name, benchmark)
        files[name] = benchmark_file(benchmark, chosen.path)
        if not files[name].is_file():
            raise ValueError(
                f"benchmarks.{name}.path: no file {files[name]}. {benchmark.title}: "
                f"{benchmark.hint}"
            )
    return files


def _check_judges(name: str, benchmark: Benchmark, chosen: BenchmarkConfig) -> None:
    key = f"benchmarks.{name}.judge"
    if benchmark.score is None and benchmark.run is None and not chosen.judges:
        if benchmark.judged is None:
            raise ValueError(
                f"benchmarks.{name}: {benchmark.title} is judged by its own command; use `external` "
                "or `recorded`"
            )
        raise ValueError(f"{key}: {benchmark.title} needs a judge")
    if chosen.judges and benchmark.judged is None:
        raise ValueError(f"{key}: {benchmark.title} takes none")
    if len(chosen.judges) > 1 and not (benchmark.judged and benchmark.judged.votes):
        raise ValueError(f"{key}: {benchmark.title} takes one")


def _check_tools(config: EvaluateConfig, name: str, benchmark: Benchmark) -> None:
    if benchmark.needs is None:
        return
    checkout = checkout_of(config, name)
    if checkout is None or not (checkout / benchmark.needs).is_file():
        raise ValueError(
            f"benchmarks.{name}.checkout: found {str(checkout)!r}, expected a directory with "
            f"{benchmark.needs}. {benchmark.title}: {benchmark.hint}"
        )
    if config.sandbox == "namespaces" and (problem := sandbox.missing()):
        raise ValueError(f"sandbox: {problem}")
