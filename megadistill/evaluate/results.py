"""The results of an evaluation: a Parquet file of scored transcripts a benchmark, and a summary.

RUN/results/SYSTEM/BENCHMARK.parquet   every answer with its score
RUN/results/SYSTEM/summary.json        benchmark -> protocol, score with interval, details
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadistill.refine.blocks import Row, read_rows_of
from megadistill.stats import Array

SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A system's scores on a benchmark's items."""

    items: tuple[str, ...]
    values_I: Array
    weights_I: Array
    details: Mapping[str, float]
    """Means of further measures over all answers."""
    num_answers: int
    num_cut: int
    """Answers that ran into their cap."""


def summarise(rows: Sequence[Row], groups: str) -> Scores:
    """Mean of each item's samples, and each item's weight in the whole."""
    values: dict[str, list[tuple[float, float]]] = defaultdict(list)
    group_of: dict[str, str] = {}
    details: Counter[str] = Counter()
    for row in rows:
        values[row["item"]].append((row["value"], row["weight"]))
        group_of[row["item"]] = row["group"]
        details.update(json.loads(row["details"]))
    items = tuple(sorted(values))
    means = np.array([_mean(values[item]) for item in items])
    weights = np.array([sum(weight for _, weight in values[item]) for item in items])
    if groups == "mean_of_means":
        weights = group_weights([group_of[item] for item in items])
    return Scores(
        items=items,
        values_I=means,
        weights_I=weights,
        details={name: total / len(rows) for name, total in details.items()},
        num_answers=len(rows),
        num_cut=sum(row["finish_reason"] == "length" for row in rows),
    )


def group_weights(groups: Sequence[str]) -> Array:
    """Weights that make a mean over items the mean over categories of means over tasks.

    A group is `category/task`; the weights add up to the number of items.
    """
    sizes = Counter(groups)
    tasks = Counter(group.partition("/")[0] for group in sizes)
    return np.array(
        [
            len(groups) / (len(tasks) * tasks[group.partition("/")[0]] * sizes[group])
            for group in groups
        ]
    )


def load_scores(file: Path, groups: str) -> Scores:
    """The scores of a benchmark's file."""
    return summarise(read_rows_of(file), groups)


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else 0.0
