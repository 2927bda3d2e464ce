"""The results of an evaluation: a Parquet file of scored transcripts a benchmark, and a summary.

RUN/results/SYSTEM/BENCHMARK.parquet   every answer with its score
RUN/results/SYSTEM/summary.json        benchmark -> protocol, score with interval, details

No answer is not an answer of zero: an answer that never came, or whose verdict cannot be read, is a
hole. Holes are counted and shown beside the score, and with too many of them there is none.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megadistill import stats
from megadistill.evaluate.benchmarks import get_benchmark
from megadistill.refine.blocks import Row, read_rows_of
from megadistill.stats import Array, Interval

SUMMARY = "summary.json"
SEED = 0
"""Of resampling."""
NOT_A_NUMBER = "not_a_number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A system's scores on a benchmark's items."""

    items: tuple[str, ...]
    values_I: Array
    weights_I: Array
    """0: nothing of the item counts."""
    details: Mapping[str, float]
    """Means of further measures over the answers with a score."""
    num_answers: int
    holes: Mapping[str, int]
    """Reason -> answers without a score."""
    faults: Mapping[str, int]
    """What else is to be said of answers, which are scored: cut, or without a final answer."""


def summarise(rows: Sequence[Row], groups: str) -> Scores:
    """Mean of each item's samples, and each item's weight in the whole."""
    values: dict[str, list[tuple[float, float]]] = defaultdict(list)
    group_of: dict[str, str] = {}
    details: Counter[str] = Counter()
    holes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for row in rows:
        value, weight, hole = row["value"], row["weight"], row.get("hole")
        if not math.isfinite(value):
            value, weight, hole = 0.0, 0.0, hole or NOT_A_NUMBER
        values[row["item"]].append((value, weight))
        group_of[row["item"]] = row["group"]
        if hole:
            holes[hole] += 1
            continue
        found = json.loads(row["details"])
        details.update(found)
        faults["cut"] += row["finish_reason"] == "length"
        faults["no_answer"] += found.get("no_answer", 0.0) > 0
    items = tuple(sorted(values))
    weights = np.array([sum(weight for _, weight in values[item]) for item in items])
    if groups == "mean_of_means":
        counts = weights > 0
        weights[counts] = group_weights(
            [group_of[i] for i, c in zip(items, counts, strict=True) if c]
        )
    return Scores(
        items=items,
        values_I=np.array([_mean(values[item]) for item in items]),
        weights_I=weights,
        details={name: total / (len(rows) - holes.total()) for name, total in details.items()},
        num_answers=len(rows),
        holes=holes,
        faults=+faults,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A system's score on a benchmark, and what is to be said beside it."""

    interval: Interval | None
    """None: there is no score, for the reason that the remark says."""
    remark: str
    answers: int
    holes: int


@dataclass(frozen=True, slots=True)
class Rules:
    """How sure an interval is to be, and the largest share of holes at which there is one."""

    confidence: float = 0.95
    most_holes: float = 0.05


def estimate(seeds: Sequence[Scores], rules: Rules, *, is_share: bool) -> Estimate:
    """The score of a system's seeds together."""
    answers = sum(found.num_answers for found in seeds)
    holes, faults = (
        sum((Counter(some) for some in found), Counter[str]())
        for found in zip(*((one.holes, one.faults) for one in seeds), strict=True)
    )
    remark = ", ".join(
        f"{count} {reason.replace('_', ' ')}" for reason, count in (holes + faults).most_common()
    )
    values_SI, weights_I = stacked(seeds)
    interval = None
    if holes.total() <= rules.most_holes * answers and weights_I.any():
        interval = stats.interval(
            values_SI, weights_I, seed=SEED, confidence=rules.confidence, shares=is_share
        )
    else:
        remark = f"no score, {holes.total()} of {answers} answers have none: {remark}"
    return Estimate(interval=interval, remark=remark, answers=answers, holes=holes.total())


def describe(file: Path, kind: str, rules: Rules) -> dict[str, Any]:
    """What a summary says of a benchmark's file (any: JSON)."""
    benchmark = get_benchmark(kind)
    found = load_scores(file, benchmark.groups)
    estimated = estimate([found], rules, is_share=benchmark.is_share)
    return {
        "benchmark": kind,
        "title": benchmark.title,
        "whole_set": benchmark.size in (None, len(found.items)),
        "items": len(found.items),
        "answers": found.num_answers,
        "holes": dict(found.holes),
        "cut": found.faults.get("cut", 0),
        "score": asdict(estimated.interval) if estimated.interval else None,
        "remark": estimated.remark,
        "details": dict(found.details),
    }


def stacked(seeds: Sequence[Scores]) -> tuple[Array, Array]:
    """Values [S, I] and weights [I] of a system's seeds: an item counts that counts in all of them."""
    if any(found.items != seeds[0].items for found in seeds):
        raise ValueError("found seeds with results on different items, expected the same")
    weights_SI = np.stack([found.weights_I for found in seeds])
    weights_I = np.where((weights_SI > 0).all(0), weights_SI.mean(0), 0.0)
    return np.stack([found.values_I for found in seeds]), weights_I


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
