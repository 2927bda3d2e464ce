"""Runs that are repetitions of one experiment."""

from collections.abc import Sequence

import yaml

from megadistill.rundir import RunDir

UNLIKE = ("name", "runs_dir", "seed")
"""Settings in which runs of one group may differ."""


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
