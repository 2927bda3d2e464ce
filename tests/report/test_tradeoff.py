"""Gain on held-out answers against divergence from the start, at equal gain."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from megadistill.report.compare import write_comparison
from megadistill.report.tradeoff import (
    cost_at,
    forgetting_curves,
    path_of,
    trade_picture,
    trade_table,
)
from megadistill.report.writing import terminal_table
from megadistill.rundir import RunDir
from tests.report.runs import Row, make_run, measured, step_row, write_rows
from tests.tiny import camopd_tree


def answered(likelihood: float, divergence: float) -> Row:
    return {
        "heldout/answers/nll": likelihood,
        "heldout/answers/nll_stderr": 0.1,
        **measured("general", 0.5, divergence),
    }


def make(path: Path, seed: int, way: Sequence[tuple[float, float]], steps: int = 4) -> RunDir:
    """A run whose measurements are the (likelihood, divergence) of `way`."""
    run = make_run(path, camopd_tree(seed=seed, name=path.name, steps=steps))
    rows = [step_row(number, "domain", **answered(*point)) for number, point in enumerate(way)]
    write_rows(run, [*rows, step_row(len(way), "domain")])
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDir]:
    """Two seeds of a quick recipe that forgets, one of a slow one that does not."""
    return [
        make(tmp_path / "quick0", 0, [(3.0, 0.0), (2.0, 0.4), (1.0, 1.0)]),
        make(tmp_path / "quick1", 1, [(3.0, 0.0), (2.0, 0.6), (1.5, 1.2)]),
        make(tmp_path / "slow1", 1, [(3.0, 0.0), (2.5, 0.1), (2.25, 0.2)], steps=5),
    ]


def test_recipes_are_compared_where_they_gained_as_much(runs: list[RunDir]) -> None:
    quick, slow = forgetting_curves(runs)
    assert (quick.group, quick.num_runs) == ("quick0, quick1", 2)
    assert quick.gain.mean == pytest.approx(1.75)
    assert quick.cost.mean == pytest.approx(1.1)
    assert quick.level == slow.level == pytest.approx(0.75)
    assert quick.cost_at_level is not None
    assert quick.cost_at_level.mean == pytest.approx((0.75 * 0.4 + 0.75 * 0.6) / 2)
    assert quick.difference is None
    assert slow.cost_at_level is not None
    assert slow.cost_at_level.mean == pytest.approx(0.2)
    # Of the quick runs only seed 1 has a counterpart.
    assert slow.difference is not None
    assert slow.difference.mean == pytest.approx(0.2 - 0.75 * 0.6)


def test_the_first_way_across_counts() -> None:
    assert cost_at([(0.0, 0.0), (-0.5, 0.3), (0.5, 0.5), (0.1, 0.1), (2.0, 9.0)], 0.25) == (
        pytest.approx(0.45)
    )


def test_without_gain_there_is_no_equal_gain(tmp_path: Path, runs: list[RunDir]) -> None:
    worse = make(tmp_path / "worse", 0, [(3.0, 0.0), (3.5, 0.2)], steps=6)
    found = forgetting_curves([*runs, worse])
    assert {one.level for one in found} == {None}
    assert {one.cost_at_level for one in found} == {None}
    assert found[-1].gain.mean == pytest.approx(-0.5)


def test_the_page_and_the_table_show_it(tmp_path: Path, runs: list[RunDir]) -> None:
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    for text in ("What was gained", "0.7500", "quick0, quick1", "by gain on answers answers"):
        assert text in page
    shown = io.StringIO()
    table = trade_table(forgetting_curves(runs))
    Console(file=shown, width=200).print(terminal_table(table, "[title]", num_texts=3))
    assert "slow1" in shown.getvalue()
    assert trade_picture(runs, tmp_path / "ways.png").stat().st_size > 1000
    assert path_of(runs[2], "answers", "general")[-1] == pytest.approx((0.75, 0.2))


def test_runs_without_answers_have_no_trade(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plain")
    write_rows(run, [step_row(1, "domain", **measured("general", 0.5, 0.5))])
    assert forgetting_curves([run]) == []
    page = write_comparison([run], tmp_path / "page.html").read_text()
    assert "What was gained" not in page
