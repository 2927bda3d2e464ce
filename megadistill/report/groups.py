"""Runs that are repetitions of one experiment."""

from collections.abc import Sequence

from megadistill.config import dump
from megadistill.rundir import RunDir

UNLIKE = {"name": "", "runs_dir": "", "seed": 0}
"""Settings in which runs of one group may differ, made the same."""


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
    return run.look_at_config().seed


def unique_names(runs: Sequence[RunDir]) -> list[str]:
    """The runs' names, with their parents' where two have the same."""
    names = [run.path.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.path.parent.name}/{name}"
        for name, run in zip(names, runs, strict=True)
    ]


def _settings(run: RunDir) -> str:
    """What makes two runs repetitions of one experiment."""
    return dump(run.look_at_config().model_copy(update=UNLIKE))
