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
from megadistill.evaluate.protocol import Benchmark
from megadistill.evaluate.results import Rules
from megadistill.evaluate.tables import RENDERERS, Table, draw, mark
from megadistill.refine.blocks import read_rows_of

NO_INTERVAL = stats.Interval(value=math.nan, low=math.nan, high=math.nan)
"""Stands in a frame where there is no score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What systems have found on one benchmark."""

    name: str
    summary: Mapping[str, Any]
    """Of the first system that has one."""
    files: dict[str, list[Path]] = field(default_factory=dict)
    """System -> the scored transcripts of each of its seeds."""

    @property
    def benchmark(self) -> Benchmark:
        return get_benchmark(self.summary["benchmark"])


def read_columns(systems: Mapping[str, Sequence[Path]]) -> list[Column]:
    """Raises `ValueError` for a directory without results, or seeds with different benchmarks."""
    columns: dict[str, Column] = {}
    for system, directories in systems.items():
        summaries = []
        for directory in directories:
            file = directory / results.SUMMARY
            if not file.is_file():
                raise ValueError(f"{directory}: no {results.SUMMARY}, expected RUN/results/SYSTEM")
            summaries.append(json.loads(file.read_text()))
        if any(summary.keys() != summaries[0].keys() for summary in summaries):
            raise ValueError(f"{system}: its seeds have results on different benchmarks")
        for name, summary in summaries[0].items():
            column = columns.setdefault(name, Column(name=name, summary=summary))
            column.files[system] = [directory / f"{name}.parquet" for directory in directories]
    if not columns:
        raise ValueError(f"{', '.join(systems)}: found no results, expected some of a benchmark")
    return list(columns.values())


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
    columns = read_columns(systems)
    first = next(iter(systems))
    return Table(
        frame=mark(
            [row for column in columns for row in _rows(column, first, rules)], rules.confidence
        ),
        systems=list(systems),
        confidence=rules.confidence,
        remarks=[text for one in columns if (text := _remark(one, rules.confidence))],
    )


def _rows(
    column: Column, first: str, rules: Rules
) -> Iterator[dict[str, Any]]:  # of the table's frame
    """A benchmark's score of each system that has one, and the p-value of its difference."""
    summary, benchmark = column.summary, column.benchmark
    baseline = None
    for system, files in column.files.items():
        scores = [results.load_scores(file, benchmark.groups) for file in files]
        estimated = results.estimate(scores, rules, is_share=benchmark.is_share)
        p_value = math.nan
        if baseline is not None and estimated.interval is not None:
            p_value = _p_value(column.name, scores, baseline)
        if system == first and estimated.interval is not None:
            baseline = scores
        interval = estimated.interval or NO_INTERVAL
        yield {
            "system": system,
            "block": benchmark.block,
            "benchmark": column.name,
            "title": summary["title"] + ("" if summary["whole_set"] else " (part)"),
            "items": summary["items"],
            "is_share": benchmark.is_share,
            "higher_is_better": summary.get("higher_is_better", benchmark.higher_is_better),
            "score": interval.value,
            "low": interval.low,
            "high": interval.high,
            "answers": estimated.answers,
            "holes": estimated.holes,
            "remark": estimated.remark,
            "p_adjusted": p_value,
        }


def _remark(column: Column, confidence: float) -> str | None:
    """What a benchmark says of all systems together."""
    if (remark := column.benchmark.remark) is None:
        return None
    rows = {s: [r for file in some for r in read_rows_of(file)] for s, some in column.files.items()}
    return remark(rows, confidence)


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
