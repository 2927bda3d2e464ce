"""Scores that others gave: LiveBench's and LiveCodeBench's own evaluators, and harnesses' logs.

Their aggregation is repeated here, so that they stand in the same tables with intervals and paired
tests.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from megadistill.data.files import read_rows
from megadistill.evaluate.benchmarks import BENCHMARKS
from megadistill.evaluate.benchmarks.harness_logs import Log, read_logs
from megadistill.evaluate.benchmarks.livecodebench import WINDOWS
from megadistill.evaluate.protocol import Benchmark, Fields, Item, user
from megadistill.refine.blocks import Row


def livebench_rows(file: Path) -> Iterator[Row]:
    """Rows of `ground_truth_judgment.jsonl` files put together: a score of 0 to 1 a question."""
    for row in read_rows(file):
        values = row.values
        try:
            score = float(values["score"])
            group = f"{values['category']}/{values['task']}"
            question = str(values["question_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{row.place} is no judgment of LiveBench: {error!r}") from None
        if not 0 <= score <= 1:
            raise ValueError(f"{row.place} has the score {score}, expected 0 to 1")
        yield scored(question, score, group)


def livecodebench_rows(file: Path, version: str) -> Iterator[Row]:
    """Problems of an `*_eval_all.json` whose contest lies in the version's window: pass@1."""
    first, end = WINDOWS[version]
    try:
        problems = json.loads(file.read_text(encoding="utf-8"))
        for problem in problems:
            day = date.fromisoformat(problem["contest_date"][:10])
            if first <= day < end:
                for sample, passed in enumerate(problem["graded_list"]):
                    yield scored(problem["question_id"], float(passed), "all", sample)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no evaluation of LiveCodeBench: {error!r}") from None


def scored(item: str, value: float, group: str, sample: int = 0) -> Row:
    """A row as scoring leaves it, without a transcript, which the evaluator keeps."""
    absent = dict.fromkeys(("extracted", "replies", "messages", "written", "num_tokens"))
    return {
        **absent,
        "item": item,
        "sample": sample,
        "group": group,
        "hole": "not_scored" if math.isnan(value) else None,
        "value": value,
        "weight": 1.0,
        "details": "{}",
        "finish_reason": "recorded",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What an evaluator left, as the results of an evaluation have it."""

    kind: str
    """Name of the benchmark whose place it takes; `recorded` for one that this project has not."""
    rows: Sequence[Row]
    facts: Fields = field(default_factory=dict)
    """What its summary says otherwise than `kind` would."""


def read_recorded(name: str, file: Path) -> Recorded:
    """An official evaluator's file, or a harness's log. Raises `ValueError` when it is none."""
    if name not in _HINTS:
        return _from_logs(name, read_logs(file))
    if not file.is_file():
        raise ValueError(f"no file {file}. {_HINTS[name]}")
    rows = livebench_rows(file) if name == "livebench" else livecodebench_rows(file, name)
    found = list(rows)
    if not found:
        raise ValueError(f"{file}: has nothing of {name}")
    return Recorded(kind=name, rows=found)


def _from_logs(name: str, logs: Sequence[Log]) -> Recorded:
    known = name in BENCHMARKS
    facts = {
        "whole_set": all(log.whole_set for log in logs),
        "higher_is_better": all(log.higher_is_better for log in logs),
    }
    return Recorded(
        kind=name if known else "recorded",
        rows=[
            scored(item, score, "all", sample) for log in logs for item, sample, score in log.scores
        ],
        facts=facts if known else {"title": name, **facts},
    )


def _no_item(row: Fields) -> Item:
    raise ValueError("its scores come from a log; name that in `recorded`")


def livebench_item(row: Fields) -> Item:
    """A question of the hub's sets, to be looked for in training data; its answers are judged there."""
    question = str(row["turns"][0])
    group = f"{row['category']}/{row['task']}"
    return Item(id=str(row["question_id"]), messages=user(question), text=question, group=group)


_LIVECODEBENCH_HINT = (
    "in a checkout of LiveCodeBench: `python -m lcb_runner.runner.main --scenario codegeneration "
    "--evaluate ...`, which writes *_eval_all.json"
)
_HINTS = {
    "livebench": (
        "in a checkout of LiveBench: `python run_livebench.py --livebench-release-option "
        "2024-11-25 ...`, which writes ground_truth_judgment.jsonl; concatenate them"
    ),
    **dict.fromkeys(WINDOWS, _LIVECODEBENCH_HINT),
}
LIVEBENCH = Benchmark(
    title="LiveBench 2024-11-25",
    rows=livebench_item,
    hint=_HINTS["livebench"],
    groups="mean_of_means",
)
RECORDED = Benchmark(title="recorded", rows=_no_item)
