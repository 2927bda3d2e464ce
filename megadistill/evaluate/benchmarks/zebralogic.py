"""ZebraLogic: a grid puzzle answered as JSON; right when every cell is."""

import json
from typing import Any

from megadistill.evaluate.protocol import Benchmark, Fields, Item, Score
from megadistill.inference.templates import load_template

TEMPLATE = "packaged:zebralogic-v1"


def to_item(row: Fields) -> Item:
    """A row of ZebraLogicBench-private's grid_mode: puzzle and solution {header, rows}."""
    solution = row["solution"]
    if isinstance(solution, str):
        solution = json.loads(solution)
    header, rows = list(solution["header"]), [list(line) for line in solution["rows"]]
    if header[0] != "House" or not rows or any(cell == "___" for line in rows for cell in line):
        raise ValueError("has no full solution; the public set hides it, the private one is gated")
    shape = {f"House {line[0]}": dict.fromkeys(header[1:], "___") for line in rows}
    values = {"puzzle": row["puzzle"], "shape": json.dumps(shape)}
    messages = tuple(load_template(TEMPLATE, tuple(values)).fill(values))
    cells = {f"House {line[0]}": dict(zip(header[1:], line[1:], strict=True)) for line in rows}
    return Item(id=str(row["id"]), messages=messages, text=row["puzzle"], reference=cells)


def last_solution(text: str) -> dict[str, Any] | None:
    """The `solution` of the last complete JSON object that has one (any: a model's JSON)."""
    decoder = json.JSONDecoder(strict=False)
    found: dict[str, Any] | None = None
    start = text.find("{")
    while start >= 0:
        try:
            values, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            start = text.find("{", start + 1)
            continue
        if isinstance(values, dict) and isinstance(values.get("solution"), dict):
            found = values["solution"]
        start = text.find("{", end)
    return found


def score(item: Item, answer: str) -> Score:
    """Puzzle accuracy; the details have the share of cells and whether there was no answer."""
    solution = last_solution(answer)
    total = right = 0
    for house, cells in item.reference.items():
        given = (solution or {}).get(house)
        for name, truth in cells.items():
            total += 1
            right += _same(given.get(name) if isinstance(given, dict) else None, truth)
    return Score(
        value=float(right == total),
        extracted=None if solution is None else json.dumps(solution),
        details={"cells": right / total, "no_answer": float(solution is None)},
    )


def _same(given: Any, truth: Any) -> bool:
    """Equal in lower case without blanks around; of a list its first element counts."""
    truth, given = (
        value[0] if isinstance(value, list) and value else value for value in (truth, given)
    )
    if not isinstance(given, str | int | float):
        return False
    return str(given).lower().strip() == str(truth).lower().strip()


ZEBRALOGIC = Benchmark(
    title="ZebraLogic",
    rows=to_item,
    score=score,
    hint=(
        "the grid_mode split with solutions is the gated data set allenai/ZebraLogicBench-private: "
        "accept its terms on the hub, then `hf download` it"
    ),
    size=1000,
)
