"""Forgetting at equal gain: likelihood of held-out answers against divergence from the start.

Runs of different recipes gain at different speeds, so their last steps do not compare. Each is
therefore also read off where it had first gained as much as every run gained in the end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import pandas as pd

from megadistill.metrics import read_metrics
from megadistill.plots import Curves, Point, Series, save_png
from megadistill.report.curves import measured_rows
from megadistill.report.groups import grouped, seed_of, unique_names
from megadistill.rundir import RunDir
from megadistill.stats import MeanWithCI, mean_with_ci

Trajectory = list[tuple[float, float]]
"""(gain, cost) at each measurement, from (0, cost at the start)."""
HEADS = (
    *("runs", "gained on", "forgotten on", "n", "NLL gain", "KL after"),
    *("at gain", "KL there", "less the first row's, by seed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgettingCurve:
    """What a group of runs gained on some answers, and what it forgot on some texts."""

    group: str
    num_runs: int
    likelihood: str
    """Name of the held-out answers."""
    divergence: str
    """Name of the held-out texts."""
    gain: MeanWithCI
    """Fall of the negative log-likelihood from the first measurement to the last."""
    cost: MeanWithCI
    """KL(teacher || student) at the last."""
    level: float | None
    """The largest gain that every run reached; None if one gained nothing."""
    cost_at_level: MeanWithCI | None
    difference: MeanWithCI | None
    """Of `cost_at_level` to the first group's, over the seeds that both have."""


def forgetting_curves(runs: Sequence[RunDir]) -> list[ForgettingCurve]:
    """Every group's forgetting curve, for each pair of held-out answers and held-out texts."""
    groups = grouped(runs)
    found: list[ForgettingCurve] = []
    for likelihood, divergence in _pairs(runs):
        paths = {
            name: {seed_of(run): path_of(run, likelihood, divergence) for run in members}
            for name, members in groups.items()
        }
        every = [path for members in paths.values() for path in members.values()]
        level = min(max(gain for gain, _ in path) for path in every)
        first: Mapping[int, float] | None = None
        for name, members in paths.items():
            gained = members.items() if level > 0 else ()
            at = {seed: cost_at(path, level) for seed, path in gained}
            found.append(
                ForgettingCurve(
                    group=name,
                    num_runs=len(members),
                    likelihood=likelihood,
                    divergence=divergence,
                    gain=mean_with_ci([path[-1][0] for path in members.values()]),
                    cost=mean_with_ci([path[-1][1] for path in members.values()]),
                    level=level if level > 0 else None,
                    cost_at_level=mean_with_ci(list(at.values())) if at else None,
                    difference=_difference(at, first) if first else None,
                )
            )
            first = first or at
    return found


def trade_table(curves: Sequence[ForgettingCurve]) -> pd.DataFrame:
    """The forgetting curves as people read them."""
    rows = [
        (
            *(one.group, one.likelihood, one.divergence, str(one.num_runs)),
            *(one.gain.text, one.cost.text, "-" if one.level is None else f"{one.level:.4f}"),
            *("-" if ci is None else ci.text for ci in (one.cost_at_level, one.difference)),
        )
        for one in curves
    ]
    return pd.DataFrame(rows, columns=HEADS)


def trade_curves(runs: Sequence[RunDir]) -> list[Curves]:
    """Every run's trajectory over gain and cost, coloured by group."""
    colours = {
        run.path: index for index, members in enumerate(grouped(runs).values()) for run in members
    }
    names = list(zip(unique_names(runs), runs, strict=True))
    return [
        Curves(
            title=f"KL to the {divergence} teacher by gain on {likelihood} answers, nats per token",
            series=[
                Series(
                    name,
                    [Point(*at) for at in path_of(run, likelihood, divergence)],
                    colours[run.path],
                )
                for name, run in names
            ],
            x="gain",
        )
        for likelihood, divergence in _pairs(runs)
    ]


def trade_picture(runs: Sequence[RunDir], file: Path) -> Path:
    """Draw the trajectories of all runs, a panel for each pair; returns `file` (PNG)."""
    panels = trade_curves(runs)
    if not panels:
        raise ValueError("--picture: the runs have no held-out answers and texts in common")
    return save_png(file, panels)


def path_of(run: RunDir, likelihood: str, divergence: str) -> Trajectory:
    """A run's gain and cost at each of its measurements."""
    keys = f"heldout/{likelihood}/nll", f"heldout/{divergence}/forward_kl"
    rows = [
        row
        for row in measured_rows(read_metrics(run.metrics_file))
        if all(key in row for key in keys)
    ]
    return [(rows[0][keys[0]] - row[keys[0]], row[keys[1]]) for row in rows]


def cost_at(path: Trajectory, level: float) -> float:
    """The cost where the gain first reaches `level`, linear between measurements."""
    for (gain, cost), (next_gain, next_cost) in pairwise(path):
        if next_gain >= level:
            return cost + (next_cost - cost) * (level - gain) / (next_gain - gain)
    raise AssertionError("no run is read beyond its gain")


def _difference(at: Mapping[int, float], first: Mapping[int, float]) -> MeanWithCI | None:
    shared = [value - first[seed] for seed, value in at.items() if seed in first]
    return mean_with_ci(shared) if shared else None


def _pairs(runs: Sequence[RunDir]) -> Iterable[tuple[str, str]]:
    """(answers, texts) that every run has measured."""
    rows = [measured_rows(read_metrics(run.metrics_file))[:1] for run in runs]
    keys = set.intersection(*({key for row in first for key in row} for first in rows))
    found = [key.split("/") for key in sorted(keys) if key.startswith("heldout/")]
    answers, texts = (
        [name for _, name, quantity in found if quantity == wanted]
        for wanted in ("nll", "forward_kl")
    )
    return product(answers, texts)
