"""Several runs side by side: curves over each other, and the outcome with its spread over seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megadistill.metrics import read_metrics
from megadistill.report.curves import compared_charts
from megadistill.report.effect import Effect, effects
from megadistill.report.history import run_state
from megadistill.report.page import render
from megadistill.rundir import RunDir, write_atomic

UNLIKE = ("name", "runs_dir", "seed")
"""Settings in which runs of one group may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean of a quantity over the runs of a group."""

    mean: float
    error: float | None
    """Standard error over the runs; None for a single one, which has no spread."""

    @property
    def text(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A held-out divergence of a group of runs that differ in their seeds only."""

    group: str
    num_runs: int
    name: str
    direction: str
    before: Spread
    after: Spread
    change: Spread
    """After minus before, run by run."""


def write_comparison(runs: Sequence[RunDir], file: Path) -> Path:
    """Write the page that compares `runs`; returns `file`."""
    names = unique_names(runs)
    rows = [read_metrics(run.metrics_file) for run in runs]
    values = {
        "names": names,
        "states": [run_state(run)[0] for run in runs],
        "steps": [found[-1]["step"] if found else 0 for found in rows],
        "paths": [str(run.path) for run in runs],
        "outcomes": outcomes(runs),
        "charts": compared_charts(list(zip(names, rows, strict=True))),
    }
    write_atomic(file, render("comparison.html", values))
    return file


def outcomes(runs: Sequence[RunDir]) -> list[Outcome]:
    """Every held-out divergence of every group, in the order of the runs."""
    groups: dict[str, list[tuple[str, RunDir]]] = {}
    for name, run in zip(unique_names(runs), runs, strict=True):
        groups.setdefault(_settings(run), []).append((name, run))
    found = []
    for members in groups.values():
        measured: dict[tuple[str, str], list[Effect]] = {}
        for _, run in members:
            for effect in effects(run):
                measured.setdefault((effect.name, effect.direction), []).append(effect)
        group = ", ".join(name for name, _ in members)
        found += [_outcome(group, same) for same in measured.values()]
    return found


def spread(values: Sequence[float]) -> Spread:
    """Mean, and standard error of the mean where there are several values."""
    several = len(values) > 1
    error = statistics.stdev(values) / len(values) ** 0.5 if several else None
    return Spread(mean=statistics.fmean(values), error=error)


def unique_names(runs: Sequence[RunDir]) -> list[str]:
    """The runs' names, with their parents' where two have the same."""
    names = [run.path.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.path.parent.name}/{name}"
        for name, run in zip(names, runs, strict=True)
    ]


def _outcome(group: str, same: Sequence[Effect]) -> Outcome:
    return Outcome(
        group=group,
        num_runs=len(same),
        name=same[0].name,
        direction=same[0].direction,
        before=spread([effect.before for effect in same]),
        after=spread([effect.after for effect in same]),
        change=spread([effect.after - effect.before for effect in same]),
    )


def _settings(run: RunDir) -> str:
    """What makes two runs repetitions of one experiment."""
    tree = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return yaml.safe_dump({key: value for key, value in tree.items() if key not in UNLIKE})
