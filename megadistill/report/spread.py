"""Which runs are repetitions of one experiment, and how far a quantity spreads over them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from scipy import stats

from megadistill.rundir import RunDir

UNLIKE = ("name", "runs_dir", "seed")
"""Settings in which runs of one group may differ."""
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanWithCI:
    """Mean of a quantity over the runs of a group."""

    mean: float
    error: float | None
    """Half of the confidence interval (Student's t) of the mean; None for a single run."""

    @property
    def text(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def mean_with_ci(values: Sequence[float]) -> MeanWithCI:
    """Mean, and its interval where there are several values."""
    count = len(values)
    if count == 1:
        return MeanWithCI(mean=values[0], error=None)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    error = quantile * statistics.stdev(values) / count**0.5
    return MeanWithCI(mean=statistics.fmean(values), error=error)


def grouped(runs: Sequence[RunDir]) -> dict[str, list[RunDir]]:
    """Names, joined -> runs that differ in nothing but name and seed, in the order of the runs."""
    groups: dict[str, list[tuple[str, RunDir]]] = {}
    for name, run in zip(unique_names(runs), runs, strict=True):
        groups.setdefault(_settings(run), []).append((name, run))
    return {
        ", ".join(name for name, _ in members): [run for _, run in members]
        for members in groups.values()
    }


def seed_of(run: RunDir) -> int:
    """The run's seed."""
    return int(yaml.safe_load(run.config_file.read_text(encoding="utf-8")).get("seed", 0))


def unique_names(runs: Sequence[RunDir]) -> list[str]:
    """The runs' names, with their parents' where two have the same."""
    names = [run.path.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.path.parent.name}/{name}"
        for name, run in zip(names, runs, strict=True)
    ]


def _settings(run: RunDir) -> str:
    """What makes two runs repetitions of one experiment."""
    tree = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return yaml.safe_dump({key: value for key, value in tree.items() if key not in UNLIKE})
