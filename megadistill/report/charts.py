"""Curves and stacked columns as inline SVG: coloured by the page's CSS, so light and dark both work."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 30
MOST_POINTS = 240
"""Of a curve: longer ones are thinned, which no picture of this size would show."""
MOST_DOTS = 60
"""Longer curves are drawn without dots and tooltips."""
MOST_COLUMNS = 120
NUM_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of a curve."""

    x: float
    y: float
    error: float = 0.0
    """Standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[Point]
    colour: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over the same axes, drawn."""

    title: str
    legend: Sequence[tuple[str, int]]
    """(name, colour) of each curve."""
    svg: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The mapping from values to the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: int = WIDTH

    def x(self, value: float) -> float:
        inside = self.width - LEFT - RIGHT
        return LEFT + inside * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        inside = HEIGHT - TOP - BOTTOM
        return TOP + inside * (self.y_high - value) / (self.y_high - self.y_low)


def draw_curves(title: str, series: Iterable[Series], *, across: str = "step") -> Chart | None:
    """A chart of the curves that have points; None when none has. `across` names x."""
    drawn = [
        Series(name=one.name, points=points, colour=one.colour % NUM_COLOURS)
        for one in series
        if (points := _thinned([point for point in one.points if math.isfinite(point.y)]))
    ]
    if not drawn:
        return None
    points = [point for one in drawn for point in one.points]
    lows = [point.y - point.error for point in points]
    highs = [point.y + point.error for point in points]
    frame = _frame([point.x for point in points], [*lows, *highs, 0.0])
    axes = _axes(frame, whole=across == "step")
    body = [axes, *(_curve(one, frame, across) for one in drawn)]
    legend = [(one.name, one.colour) for one in drawn]
    return Chart(title=title, legend=legend, svg=_svg(title, WIDTH, body))


def draw_columns(
    title: str, names: Sequence[str], columns: Sequence[tuple[str, Sequence[float]]]
) -> Chart | None:
    """Stacked columns, one for each step or for several steps; None when all are empty.

    A column is (label, values), its values in the order of `names`.
    """
    binned = _binned(columns)
    heights = [sum(values) for _, values in binned]
    if not heights or max(heights) <= 0:
        return None
    width = 2 * WIDTH
    frame = Frame(x_low=0, x_high=len(binned), y_low=0, y_high=1.05 * max(heights), width=width)
    body = [_axes(frame, across=False)]
    for index, (label, values) in enumerate(binned):
        base = 0.0
        for number, value in enumerate(values):
            if value > 0:
                body.append(
                    Markup(
                        '<rect class="fill c{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" '
                        'height="{:.1f}"><title>{}: {} {:.1f} s</title></rect>'
                    ).format(
                        number % NUM_COLOURS,
                        frame.x(index + 0.08),
                        frame.y(base + value),
                        frame.x(0.84) - frame.x(0),
                        frame.y(base) - frame.y(base + value),
                        label,
                        names[number],
                        value,
                    )
                )
                base += value
        if index % math.ceil(len(binned) / 12) == 0:
            body.append(_text(frame.x(index + 0.5), HEIGHT - 12, label, "middle"))
    legend = [(name, number % NUM_COLOURS) for number, name in enumerate(names)]
    return Chart(title=title, legend=legend, svg=_svg(title, width, body))


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values between `low` and `high`, at most `most` + 1 of them."""
    span = high - low
    size = 10.0 ** math.floor(math.log10(span / most))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _frame(xs: Sequence[float], ys: Sequence[float]) -> Frame:
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = min(ys), max(ys)
    margin = 0.06 * (y_high - y_low) or 1.0
    return Frame(
        x_low=x_low,
        x_high=x_high,
        y_low=y_low - margin if y_low < 0 else 0.0,
        y_high=y_high + margin if y_high > 0 or y_low == 0 else 0.0,
    )


def _axes(frame: Frame, *, across: bool = True, whole: bool = True) -> Markup:
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        kind = "zero" if value == 0 else "grid"
        parts.append(_line(LEFT, y, frame.width - RIGHT, y, kind))
        parts.append(_text(LEFT - 6, y + 4, f"{value:.4g}", "end"))
    if across:
        shown = (v for v in ticks(frame.x_low, frame.x_high, 8) if v == round(v) or not whole)
        parts += [_text(frame.x(v), HEIGHT - 12, f"{v:.4g}", "middle") for v in shown]
    return Markup("").join(parts)


def _curve(series: Series, frame: Frame, across: str) -> Markup:
    path = " ".join(f"{frame.x(point.x):.1f},{frame.y(point.y):.1f}" for point in series.points)
    parts = [Markup('<polyline points="{}"/>').format(path)]
    dotted = len(series.points) <= MOST_DOTS
    for point in series.points:
        x, y = frame.x(point.x), frame.y(point.y)
        if point.error:
            parts.append(
                _line(x, frame.y(point.y - point.error), x, frame.y(point.y + point.error), "error")
            )
        if dotted:
            error = f" ± {point.error:.4g}" if point.error else ""
            parts.append(
                Markup(
                    '<circle cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}, {} {:.5g}: {:.5g}{}</title>'
                    "</circle>"
                ).format(x, y, series.name, across, point.x, point.y, error)
            )
    return Markup('<g class="curve c{}">{}</g>').format(series.colour, Markup("").join(parts))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def _svg(title: str, width: int, body: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, HEIGHT, escape(title), Markup("").join(body)
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Evenly chosen, first and last among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(number * last / (MOST_POINTS - 1))] for number in range(MOST_POINTS)]


def _binned(columns: Sequence[tuple[str, Sequence[float]]]) -> list[tuple[str, list[float]]]:
    """Neighbouring columns added up until there are few enough."""
    size = math.ceil(len(columns) / MOST_COLUMNS) or 1
    binned = []
    for start in range(0, len(columns), size):
        members = columns[start : start + size]
        label = members[0][0] if size == 1 else f"{members[0][0]}-{members[-1][0]}"
        binned.append((label, [sum(parts) for parts in zip(*(m[1] for m in members), strict=True)]))
    return binned
