"""The table of a comparison in its formats, from scores given by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megadistill.evaluate.compare import make_table
from megadistill.evaluate.results import SUMMARY, Rules
from megadistill.evaluate.tables import Table, comma_separated, hypertext, latex, mark, markdown

SYSTEMS = ("base", "a_b & <c>", "best")
SCORES = {
    "exam": ("domain", True, (0.5, 0.75, 0.9)),
    "essay": ("general", True, (0.4, 0.3, None)),
    "kl": ("heldout", False, (0.25, 0.125, 0.5)),
}
"""Benchmark -> block, whether it is a share and more is better, the systems' scores."""


@pytest.fixture
def table() -> Table:
    rows: list[dict[str, Any]] = [
        {
            "system": system,
            "block": block,
            "benchmark": name,
            "title": f"{name}, 1%",
            "items": 40,
            "is_share": is_share,
            "higher_is_better": is_share,
            "score": score,
            "answers": 40,
            "holes": 0,
            "remark": "",
            "low": score / 2,
            "high": score * 1.1,
            "p_adjusted": math.nan if system == "base" else 0.001,
        }
        for name, (block, is_share, scores) in SCORES.items()
        for system, score in zip(SYSTEMS, scores, strict=True)
        if score is not None
    ]
    return Table(frame=mark(rows, 0.95), systems=SYSTEMS, confidence=0.95)


def test_markdown_has_blocks_averages_marks_and_the_best(table: Table) -> None:
    head, _, base, other, best, *_ = markdown(table).splitlines()
    assert head == (
        "| system | essay, 1% (n=40) | General average | exam, 1% (n=40) | Domain average "
        "| kl, 1% (n=40) |"
    )
    assert base == (
        "| base | **40.0 [20.0, 44.0]** | 40.0 | 50.0 [25.0, 55.0] | 50.0 | 0.250 [0.125, 0.275] |"
    )
    assert other == (
        "| a_b & <c> | 30.0 [15.0, 33.0] - | 30.0 | 75.0 [37.5, 82.5] + | 75.0 "
        "| **0.125 [0.062, 0.138] +** |"
    )
    assert best == (
        "| best | – | – | **90.0 [45.0, 99.0] +** | 90.0 "  # noqa: RUF001 - a dash
        "| 0.500 [0.250, 0.550] - |"
    )
    assert "KL and NLL in nats" in table.note


def test_p_values_are_adjusted_for_their_number(table: Table) -> None:
    rows = comma_separated(table).splitlines()
    assert rows[1] == "base,general,essay,40,40.0000,20.0000,44.0000,,,40,0,"
    assert rows[4] == "a_b & <c>,general,essay,40,30.0000,15.0000,33.0000,0.005,-,40,0,"
    assert len(rows) == 1 + 8


def test_latex_and_html_escape_what_is_theirs(table: Table) -> None:
    text = latex(table)
    assert r"a\_b \& <c> & 30.0$^{-}$ {\scriptsize [15.0, 33.0]}" in text
    assert r"\multicolumn{2}{c}{General}" in text
    assert r"essay, 1\% & average" in text
    assert "best & -- & -- &" in text
    page = hypertext(table)
    assert "a_b &amp; &lt;c&gt;" in page
    assert "<b>0.125<sup>+</sup> <small>[0.062, 0.138]</small></b>" in page
    assert "<c>" not in page


def test_results_without_any_benchmark_are_refused(tmp_path: Path) -> None:
    (tmp_path / SUMMARY).write_text(json.dumps({}))
    with pytest.raises(ValueError, match="x: found no results, expected some of a benchmark"):
        make_table({"x": [tmp_path]}, Rules())
