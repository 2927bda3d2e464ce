"""Pictures: what a page gets of them, and that each kind of panel is drawn."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image

from megadistill import plots
from megadistill.plots import Bars, Columns, Curves, Histogram, Point, Radar, Series


def titles_of(panel: Curves | Columns) -> list[str | None]:
    """What is shown under the pointer."""
    return [title.text for title in ElementTree.fromstring(plots.svg(panel)).iter("title")]


def one_curve(*points: Point) -> Curves:
    return Curves(title="t", series=[Series("a", points, 0)])


def test_every_point_of_a_curve_shows_its_value() -> None:
    curves = Curves(
        title="loss",
        series=[
            Series("<a> & $b$", [Point(1, 2.5, 0.25), Point(2, -1.0)], 0),
            Series("none", [], 1),
        ],
        x="gain",
    )
    assert titles_of(curves) == ["<a> & $b$, gain 1: 2.5 ± 0.25", "<a> & $b$, gain 2: -1"]
    assert curves.legend == [("<a> & $b$", 0)]


def test_every_part_of_a_column_shows_its_value() -> None:
    columns = Columns(title="s", names=["x", "y"], columns=[("0", [1.0, 0.0]), ("1", [2.0, 3.5])])
    assert titles_of(columns) == ["0: x 1.0 s", "1: x 2.0 s", "1: y 3.5 s"]


def test_many_columns_are_added_up() -> None:
    columns = Columns(title="s", names=["x"], columns=[(str(n), [1.0]) for n in range(250)])
    titles = titles_of(columns)
    assert titles[:2] == ["0-2: x 3.0 s", "3-5: x 3.0 s"]
    assert titles[-1] == "249: x 1.0 s"


def test_long_curves_are_thinned_and_have_no_dots() -> None:
    long = one_curve(*(Point(n, n % 7) for n in range(100_000)))
    assert titles_of(long) == []
    assert len(plots.svg(long)) < 50_000


def test_nothing_to_draw_has_no_legend() -> None:
    empty = Columns(title="s", names=["x"], columns=[("0", [0.0])])
    nothing = Columns(title="s", names=["x"], columns=[])
    for panel in (one_curve(), one_curve(Point(1, float("nan"))), empty, nothing):
        assert panel.legend == []


@pytest.mark.parametrize(
    "points", [[Point(1, 0.0)], [Point(1, -2.0), Point(2, -2.0)], [Point(0, 1e-9), Point(9, 1e9)]]
)
def test_a_curve_of_one_point_or_one_value_is_drawn(points: list[Point]) -> None:
    assert len(titles_of(one_curve(*points))) == len(points)


def test_svg_takes_its_colours_from_the_page_and_refers_to_nothing_outside() -> None:
    svg = plots.svg(one_curve(Point(1, 1), Point(2, 3)))
    assert "var(--c0)" in svg
    assert not [colour for colour in plots.VARIABLES if colour in svg]
    for text in ("http", "url(", "<style", "xmlns", "metadata"):
        assert text not in svg
    assert svg == plots.svg(one_curve(Point(1, 1), Point(2, 3)))


def test_every_kind_of_panel_is_drawn_side_by_side(tmp_path: Path) -> None:
    heads = ["one", "two, more", "three"]
    panels: list[plots.Panel] = [
        one_curve(Point(0, 1), Point(1, 2)),
        Columns(title="columns", names=["x"], columns=[("0", [1.0])], width=4.0),
        Bars(title="bars", heads=heads, series={"a": [(1.0, 0.5, 2.0), None, (3.0, 3.0, 3.0)]}),
        Radar(title="radar", heads=heads, series={"a": [1.0, 0.0, 2.0], "b": [0.0, 0.0, 1.0]}),
        Histogram(title="histogram", series={"a": [1.0, 2.0, 2.0], "none": []}),
        Histogram(title="empty", series={}),
    ]
    pixels = image.imread(plots.save_png(tmp_path / "all.png", panels, "title"))
    height, width, _ = pixels.shape
    assert width / height == pytest.approx(sum(panel.width for panel in panels) / 4.2, rel=0.01)
    # Each panel has ink of a colour in its part of the picture.
    ends = np.cumsum([panel.width for panel in panels]) / sum(panel.width for panel in panels)
    parts = np.split(pixels[:, :, :3], (ends[:-1] * width).astype(int), axis=1)
    coloured = [bool((part.max(-1) - part.min(-1) > 0.2).any()) for part in parts]
    assert coloured == [True, True, True, True, True, False]
