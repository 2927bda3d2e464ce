"""LiveBench and LiveCodeBench: judged by their own evaluators, whose files are read here.

Both have commands that generate and judge; only their aggregation is repeated here, so that their
scores stand in the same tables with intervals and paired tests.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from megadistill.data.files import read_rows
from megadistill.evaluate.benchmarks.livecodebench import WINDOWS
from megadistill.evaluate.protocol import Benchmark, Item, user
from megadistill.inference.requests import SamplingParams


def livebench_rows(file: Path) -> Iterator[dict[str, Any]]:
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


def livecodebench_rows(file: Path, version: str) -> Iterator[dict[str, Any]]:
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


def scored(item: str, value: float, group: str, sample: int = 0) -> dict[str, Any]:
    """A row as scoring leaves it, without a transcript, which the evaluator keeps."""
    absent = dict.fromkeys(("extracted", "replies", "messages", "written", "num_tokens"))
    return {
        **absent,
        "item": item,
        "sample": sample,
        "group": group,
        "value": value,
        "weight": 1.0,
        "details": "{}",
        "finish_reason": "recorded",
    }


def read_recorded(kind: str, file: Path) -> list[dict[str, Any]]:
    """The rows of an official evaluator's file. Raises `ValueError` when it is none."""
    if kind != "livebench" and kind not in WINDOWS:
        raise ValueError(f"found {kind!r}, expected livebench, {', '.join(WINDOWS)}")
    if not file.is_file():
        raise ValueError(f"no file {file}. {_HINTS[kind]}")
    rows = livebench_rows(file) if kind == "livebench" else livecodebench_rows(file, kind)
    found = list(rows)
    if not found:
        raise ValueError(f"{file}: has nothing of {kind}")
    return found


def livebench_item(row: Mapping[str, Any]) -> Item:
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
    block="general",
    sampling=SamplingParams(),
    rows=livebench_item,
    hint=_HINTS["livebench"],
    groups="mean_of_means",
)
