"""Several runs side by side: curves over each other, and the outcome with its spread over seeds."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from megadistill.atomic import write_atomic
from megadistill.launch.attempts import run_state
from megadistill.metrics import read_metrics
from megadistill.report.curves import compared_curves
from megadistill.report.effect import effects
from megadistill.report.groups import grouped, unique_names
from megadistill.report.page import render, shown
from megadistill.report.tradeoff import forgetting_curves, trade_curves, trade_table
from megadistill.rundir import RunDir
from megadistill.stats import mean_with_ci

HEADS = ("runs", "held out", "nats per token", "n", "before", "after", "after less before")


def write_comparison(runs: Sequence[RunDir], file: Path) -> Path:
    """Write the page that compares `runs`; returns `file`."""
    names = unique_names(runs)
    rows = [read_metrics(run.metrics_file) for run in runs]
    curves = forgetting_curves(runs)
    values = {
        "names": names,
        "states": [run_state(run)[0] for run in runs],
        "steps": [found[-1]["step"] if found else 0 for found in rows],
        "paths": [str(run.path) for run in runs],
        "outcomes": outcomes(runs),
        "trade": trade_table(curves),
        "trade_charts": shown(trade_curves(runs)),
        "charts": shown(compared_curves(list(zip(names, rows, strict=True)))),
    }
    write_atomic(file, render("comparison.html", values))
    return file


def outcomes(runs: Sequence[RunDir]) -> pd.DataFrame:
    """Every held-out quantity of every group of runs that differ in their seeds only."""
    rows = []
    for group, members in grouped(runs).items():
        measured = pd.concat([effects(run) for run in members])
        measured["change"] = measured["after"] - measured["before"]
        for names, same in measured.groupby(["name", "direction"], sort=False):
            shown = (mean_with_ci(list(same[key])).text for key in ("before", "after", "change"))
            rows.append((group, *names, str(len(same)), *shown))
    return pd.DataFrame(rows, columns=HEADS)
