"""Several runs side by side: curves over each other, and the outcome with its spread over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megadistill.atomic import write_atomic
from megadistill.metrics import read_metrics
from megadistill.report.curves import compared_charts
from megadistill.report.effect import Effect, effects
from megadistill.report.groups import grouped, unique_names
from megadistill.report.history import run_state
from megadistill.report.page import render
from megadistill.report.tradeoff import forgetting_charts, forgetting_curves
from megadistill.rundir import RunDir
from megadistill.stats import MeanWithCI, mean_with_ci


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A held-out quantity of a group of runs that differ in their seeds only."""

    group: str
    num_runs: int
    name: str
    direction: str
    before: MeanWithCI
    after: MeanWithCI
    change: MeanWithCI
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
        "forgetting_curves": forgetting_curves(runs),
        "trade_charts": forgetting_charts(runs),
        "charts": compared_charts(list(zip(names, rows, strict=True))),
    }
    write_atomic(file, render("comparison.html", values))
    return file


def outcomes(runs: Sequence[RunDir]) -> list[Outcome]:
    """Every held-out quantity of every group, in the order of the runs."""
    found = []
    for group, members in grouped(runs).items():
        measured: dict[tuple[str, str], list[Effect]] = {}
        for run in members:
            for effect in effects(run):
                measured.setdefault((effect.name, effect.direction), []).append(effect)
        found += [_outcome(group, same) for same in measured.values()]
    return found


def _outcome(group: str, same: Sequence[Effect]) -> Outcome:
    return Outcome(
        group=group,
        num_runs=len(same),
        name=same[0].name,
        direction=same[0].direction,
        before=mean_with_ci([effect.before for effect in same]),
        after=mean_with_ci([effect.after for effect in same]),
        change=mean_with_ci([effect.after - effect.before for effect in same]),
    )
