"""All pictures, drawn by matplotlib: PNG files, and SVG for a page, with values under the pointer.

A panel says what is drawn and draws it into axes. In SVG the colours are variables of the page's style
sheet, so that they change with its light and dark.
"""

import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = (
    "#1f6fb4", "#c9302c", "#2e8b43", "#8157b5", "#c46a0a", "#6b7280", "#0e8a8a", "#b03a87"
)  # fmt: skip
FAINT, EDGE = "#666677", "#d5d9e0"
VARIABLES = {FAINT: "faint", EDGE: "edge", **{c: f"c{n}" for n, c in enumerate(COLOURS)}}
"""Colour -> its name in the page's style sheet."""
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": FAINT,
    **{f"axes.spines.{side}": False for side in ("bottom", "left", "right", "top")},
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.color": EDGE,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "megadistill",
    "text.parse_math": False,
    "xtick.bottom": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "ytick.left": False,
}
PNG_HEIGHT, SVG_HEIGHT = 4.2, 2.6
MOST_POINTS = 240
"""Of a curve: longer ones are thinned, which no picture of this size would show."""
MOST_DOTS = 60
"""Longer curves are drawn without dots and without values under the pointer."""
MOST_COLUMNS = 120
HOVER = "hover"
"""Begins the SVG id of what shows values under the pointer; the texts follow as JSON."""

Axes = Any  # matplotlib has no types


class Point(NamedTuple):
    """One value of a curve."""

    x: float
    y: float
    error: float = 0.0
    """Standard error."""


class Series(NamedTuple):
    """One curve."""

    name: str
    points: Sequence[Point]
    colour: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Curves over axes that include zero; values that are no numbers are left out."""

    title: str
    series: Sequence[Series]
    x: str = "step"
    width: float = 4.4

    @property
    def legend(self) -> list[tuple[str, int]]:
        """(name, colour) of each curve."""
        return [(name, colour % len(COLOURS)) for name, points, colour in self._finite()]

    def draw(self, axes: Axes) -> None:
        axes.axhline(0, color=FAINT, linewidth=0.8).sticky_edges.y.append(0)
        for name, points, colour in self._finite():
            self._draw_curve(axes, name, _thinned(points), COLOURS[colour % len(COLOURS)])
        if self.x == "step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(self.x)

    def _finite(self) -> list[Series]:
        kept = [s._replace(points=[p for p in s.points if math.isfinite(p.y)]) for s in self.series]
        return [series for series in kept if series.points]

    def _draw_curve(self, axes: Axes, name: str, points: Sequence[Point], colour: str) -> None:
        xs, ys, errors = zip(*points, strict=True)
        dotted = len(points) <= MOST_DOTS
        drawn = axes.errorbar(
            xs,
            ys,
            errors if any(errors) else None,
            color=colour,
            elinewidth=1.2,
            label=name,
            marker="o" if dotted else "",
            markersize=3.6,
        )
        if dotted:
            texts = [
                f"{name}, {self.x} {x:.5g}: {y:.5g}" + (f" ± {error:.4g}" if error else "")
                for x, y, error in points
            ]
            _show_on_hover(drawn.lines[0], texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Stacked columns, each (label, seconds of each activity); neighbours add up where there are many."""

    title: str
    names: Sequence[str]
    columns: Sequence[tuple[str, Sequence[float]]]
    width: float = 13.0

    @property
    def legend(self) -> list[tuple[str, int]]:
        """(name, colour) of each activity; empty when there is nothing to draw."""
        drawn = any(sum(values) > 0 for _, values in self.columns)
        return [(name, number) for number, name in enumerate(self.names) if drawn]

    def draw(self, axes: Axes) -> None:
        size = math.ceil(len(self.columns) / MOST_COLUMNS)
        groups = [self.columns[at : at + size] for at in range(0, len(self.columns), size)]
        labels = ["-".join(dict.fromkeys((group[0][0], group[-1][0]))) for group in groups]
        heights = np.array([np.sum([values for _, values in group], axis=0) for group in groups])
        bases = heights.cumsum(axis=1) - heights
        for number, name in enumerate(self.names):
            (at,) = heights[:, number].nonzero()
            bars = axes.bar(at, heights[at, number], 0.84, bases[at, number], color=COLOURS[number])
            for bar, place in zip(bars, at, strict=True):
                _show_on_hover(bar, [f"{labels[place]}: {name} {heights[place, number]:.1f} s"])
        every = math.ceil(len(labels) / 12)
        axes.set_xticks(range(0, len(labels), every), labels[::every])
        axes.margins(x=0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A group of bars under each head: series -> (value, low, high), or None where there is none."""

    title: str
    heads: Sequence[str]
    series: Mapping[str, Sequence[tuple[float, float, float] | None]]

    @property
    def width(self) -> float:
        return 1.0 + 1.4 * len(self.heads)

    def draw(self, axes: Axes) -> None:
        width = 0.8 / len(self.series)
        for number, (name, cells) in enumerate(self.series.items()):
            found = [(at, *cell) for at, cell in enumerate(cells) if cell is not None]
            at, value, low, high = np.array(found).reshape(-1, 4).T
            axes.bar(
                at + (number - (len(self.series) - 1) / 2) * width,
                value,
                width,
                yerr=np.maximum([value - low, high - value], 0).tolist(),
                color=COLOURS[number % len(COLOURS)],
                error_kw={"ecolor": "black", "capsize": 2},
                label=name,
            )
        axes.set_xticks(range(len(self.heads)), [head.replace(", ", "\n") for head in self.heads])
        axes.tick_params(axis="x", labelrotation=20, labelsize="small")


@dataclass(frozen=True, slots=True, kw_only=True)
class Radar:
    """A shape for each series, every axis from 0 to its largest value."""

    title: str
    heads: Sequence[str]
    series: Mapping[str, Sequence[float]]
    width: float = 5.5

    def draw(self, axes: Axes) -> None:
        angles = np.linspace(0, 2 * np.pi, len(self.heads), endpoint=False)
        largest = np.max(list(self.series.values()), axis=0)
        for number, (name, values) in enumerate(self.series.items()):
            shape = np.divide(values, np.where(largest > 0, largest, 1))
            closed = np.append(angles, angles[0]), np.append(shape, shape[0])
            axes.plot(*closed, color=COLOURS[number % len(COLOURS)], label=name)
        axes.grid(visible=True, axis="both")
        axes.set_xticks(angles, self.heads, fontsize="small")
        axes.set_yticklabels([])
        sides = np.sign(np.cos(angles).round(3)).astype(int)
        for label, side in zip(axes.get_xticklabels(), sides, strict=True):
            label.set_horizontalalignment(("center", "left", "right")[side])


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Numbers of records by value, of several series over the same bins."""

    title: str
    series: Mapping[str, Sequence[float]]
    width: float = 4.0

    def draw(self, axes: Axes) -> None:
        filled = {name: values for name, values in self.series.items() if len(values)}
        bins = np.histogram_bin_edges(np.concatenate([*filled.values(), []]), bins=25)
        for number, (name, values) in enumerate(filled.items()):
            axes.hist(
                values, bins=bins, alpha=0.55, color=COLOURS[number % len(COLOURS)], label=name
            )
        axes.set_ylabel("records")


Panel = Curves | Columns | Bars | Radar | Histogram
"""One pair of axes with what is on it."""


def save_png(file: Path, panels: Sequence[Panel], title: str = "") -> Path:
    """Draw the panels side by side; returns `file`."""
    widths = [panel.width for panel in panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(sum(widths), PNG_HEIGHT))
        grid = figure.add_gridspec(1, len(panels), width_ratios=widths)
        for number, panel in enumerate(panels):
            projection = "polar" if isinstance(panel, Radar) else None
            axes = figure.add_subplot(grid[0, number], projection=projection)
            panel.draw(axes)
            axes.set_title(textwrap.fill(panel.title, round(13 * panel.width)))
        _add_legends(figure)
        figure.suptitle(title)
        figure.savefig(file, dpi=110)
    return file


def svg(panel: Curves | Columns) -> Markup:
    """An element for a page: nothing in it refers to anything outside, or can be referred to."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(panel.width, SVG_HEIGHT))
        panel.draw(figure.add_subplot())
        for artist in figure.findobj():
            artist.set_clip_on(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True)
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.text, element.tail = (element.text or "").strip(), None
    for group in root.iter("g"):
        texts = group.attrib.pop("id", "").partition(HOVER)[2]
        marks = group.findall(".//use") or group.findall("path")
        for mark, text in zip(marks, json.loads(texts or "[]"), strict=False):
            ElementTree.SubElement(mark, "title").text = text
    kept = [child for child in root if child.tag == "g"]  # not its metadata, nor its style sheet
    size = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": panel.title}
    picture = ElementTree.Element("svg", size)
    picture.extend(kept)
    text = ElementTree.tostring(picture, encoding="unicode")
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)


def _show_on_hover(artist: Any, texts: Sequence[str]) -> None:
    """Let each mark of what was drawn show its text under the pointer, in SVG."""
    artist.set_gid(HOVER + json.dumps(texts))


def _add_legends(figure: Any) -> None:
    """One below where all axes have the same, else one in each."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles, labels = found[0]
    if len(found) > 1 and all(others == labels for _, others in found):
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4) or 1)
        return
    for axes, (_, own) in zip(figure.axes, found, strict=True):
        if own:
            axes.legend()


def _thinned(points: Sequence[Point]) -> list[Point]:
    """So many that a picture can show them, the first and the last among them."""
    chosen = np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).round()
    return [points[int(index)] for index in chosen]
