"""The papers' table from results: systems against benchmarks, with intervals and significance.

Each system but the first (the baseline) is tested against it on the same items; Holm's procedure
holds the error over the whole table.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megadistill import stats
from megadistill.atomic import write_atomic
from megadistill.evaluate import results
from megadistill.evaluate.benchmarks import get_benchmark
from megadistill.evaluate.results import Rules
from megadistill.evaluate.tables import RENDERERS, Table, draw, mark
from megadistill.refine.blocks import read_rows_of

NO_INTERVAL = stats.Interval(value=math.nan, low=math.nan, high=math.nan)
"""Stands in a frame where there is no score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResults:
    """One system: a directory of results for each of its seeds."""

    name: str
    directories: Sequence[Path]
    summaries: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, name: str, directories: Sequence[Path]) -> "SystemResults":
        """Raises `ValueError` for a directory without results, or seeds with different benchmarks."""
        summaries = []
        for directory in directories:
            file = directory / results.SUMMARY
            if not file.is_file():
                raise ValueError(f"{directory}: no {results.SUMMARY}, expected RUN/results/SYSTEM")
            summaries.append(json.loads(file.read_text()))
        if any(summary.keys() != summaries[0].keys() for summary in summaries):
            raise ValueError(f"{name}: its seeds have results on different benchmarks")
        return cls(name=name, directories=directories, summaries=summaries)

    def scores(self, benchmark: str) -> list[results.Scores] | None:
        """Scores of every seed; None where the system has none on this benchmark."""
        if benchmark not in self.summaries[0]:
            return None
        groups = get_benchmark(self.summaries[0][benchmark]["benchmark"]).groups
        return [
            results.load_scores(directory / f"{benchmark}.parquet", groups)
            for directory in self.directories
        ]


def parse_systems(words: Sequence[str]) -> dict[str, list[Path]]:
    """`DIR` or `NAME=DIR,DIR,...` of each word; the directories of one system are its seeds."""
    systems: dict[str, list[Path]] = {}
    for word in words:
        name, separator, places = word.rpartition("=")
        directories = [Path(place) for place in places.split(",")]
        name = name if separator else directories[0].absolute().name
        if name in systems:
            raise ValueError(f"--compare: two systems are called {name!r}; give NAME=DIR")
        systems[name] = directories
    return systems


def make_table(systems: Mapping[str, Sequence[Path]], rules: Rules) -> Table:
    """The table of these systems, the first of which is the baseline."""
    loaded = [SystemResults.load(name, places) for name, places in systems.items()]
    names = list(dict.fromkeys(name for system in loaded for name in system.summaries[0]))
    rows = [row for name in names for row in _rows(name, loaded, rules)]
    if not rows:
        raise ValueError(f"{', '.join(systems)}: found no results, expected some of a benchmark")
    return Table(
        frame=mark(rows, rules.confidence),
        systems=[system.name for system in loaded],
        confidence=rules.confidence,
        remarks=[remark for name in names if (remark := _remark(name, loaded, rules.confidence))],
    )


def _rows(
    name: str, loaded: Sequence[SystemResults], rules: Rules
) -> Iterator[dict[str, Any]]:  # of the table's frame
    """A benchmark's score of each system that has one, and the p-value of its difference."""
    found = next(system.summaries[0][name] for system in loaded if name in system.summaries[0])
    benchmark = get_benchmark(found["benchmark"])
    baseline = None
    for system in loaded:
        scores = system.scores(name)
        if scores is None:
            continue
        estimated = results.estimate(scores, rules, is_share=benchmark.is_share)
        interval = estimated.interval or NO_INTERVAL
        p_value = math.nan
        if baseline is not None and estimated.interval is not None:
            p_value = _p_value(name, scores, baseline)
        if system is loaded[0] and estimated.interval is not None:
            baseline = scores
        yield {
            "system": system.name,
            "block": benchmark.block,
            "benchmark": name,
            "title": found["title"] + ("" if found["whole_set"] else " (part)"),
            "items": found["items"],
            "is_share": benchmark.is_share,
            "higher_is_better": found.get("higher_is_better", benchmark.higher_is_better),
            "score": interval.value,
            "low": interval.low,
            "high": interval.high,
            "answers": estimated.answers,
            "holes": estimated.holes,
            "remark": estimated.remark,
            "p_adjusted": p_value,
        }


def _remark(name: str, loaded: Sequence[SystemResults], confidence: float) -> str | None:
    """What a benchmark says of all systems together."""
    chosen = [system for system in loaded if name in system.summaries[0]]
    benchmark = get_benchmark(chosen[0].summaries[0][name]["benchmark"])
    if benchmark.remark is None:
        return None
    rows = {
        system.name: [
            row
            for directory in system.directories
            for row in read_rows_of(directory / f"{name}.parquet")
        ]
        for system in chosen
    }
    return benchmark.remark(rows, confidence)


def write_tables(systems: Mapping[str, Sequence[Path]], folder: Path, rules: Rules) -> str:
    """Write the table in every format, with its picture; returns the Markdown."""
    table = make_table(systems, rules)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, render in RENDERERS.items():
        write_atomic(folder / f"table.{suffix}", render(table))
    draw(table, folder / "table.png")
    return RENDERERS["md"](table)


def _p_value(
    name: str, scores: Sequence[results.Scores], baseline: Sequence[results.Scores]
) -> float:
    """Of the difference to the baseline's."""
    if scores[0].items != baseline[0].items:
        raise ValueError(f"{name}: the systems have results on different items, expected the same")
    values_SI, weights_I = results.stacked(scores)
    reference_SI, reference_I = results.stacked(baseline)
    # Weights differ where they depend on the answers (Arena-Hard's decided games): paired by item,
    # of which those count that count for both.
    both_I = np.where((weights_I > 0) & (reference_I > 0), (weights_I + reference_I) / 2, 0.0)
    if not both_I.any():
        return math.nan
    return stats.compare(values_SI, reference_SI, both_I, seed=results.SEED)
