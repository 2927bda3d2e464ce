"""The picture of a table: bars by benchmark, and a radar where there are enough of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megadistill.evaluate.tables import Column, Table

RADAR_FROM = 3
"""Fewer axes make no shape."""


def draw_bars(table: Table, file: Path) -> Path:
    """Bars with intervals, those in points and those in nats apart; from three benchmarks on, a radar."""
    scores = [column for column in table.columns if column.in_points]
    signals = [column for column in table.columns if not column.in_points]
    bars = [columns for columns in (scores, signals) if columns]
    radar = len(scores) >= RADAR_FROM
    num_parts = len(bars) + radar
    widths = [1.0 + 1.4 * len(columns) for columns in bars] + [4.5] * radar
    figure = Figure(figsize=(1.0 + sum(widths), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, num_parts, width_ratios=widths)
    for number, columns in enumerate(bars):
        _bars(figure.add_subplot(grid[0, number]), table, columns)
    if radar:
        _radar(figure.add_subplot(grid[0, num_parts - 1], projection="polar"), table, scores)
    figure.savefig(file, dpi=120)
    return file


def _bars(axes: Any, table: Table, columns: Sequence[Column]) -> None:  # matplotlib has no types
    width = 0.8 / len(table.systems)
    for number, system in enumerate(table.systems):
        for at, column in enumerate(columns):
            cell = table.cells.get((system, column.name))
            if cell is None:
                continue
            value = column.scale * cell.interval.value
            low, high = column.scale * cell.interval.low, column.scale * cell.interval.high
            errors = [[value - low], [high - value]]
            axes.bar(
                at + (number - (len(table.systems) - 1) / 2) * width,
                value,
                width,
                yerr=np.maximum(errors, 0).tolist(),
                color=f"C{number}",
                capsize=2,
                label=system if at == 0 else None,
            )
    heads = [column.title.replace(", ", "\n") for column in columns]
    axes.set_xticks(range(len(columns)), heads, fontsize=8)
    axes.tick_params(axis="x", rotation=20)
    axes.set_ylabel("score (points)" if columns[0].in_points else "nats per token (less is better)")
    axes.legend(fontsize=8)


def _radar(axes: Any, table: Table, columns: Sequence[Column]) -> None:
    """Each axis from 0 to the best score of its benchmark."""
    angles = np.linspace(0, 2 * np.pi, len(columns), endpoint=False).tolist()
    for system in table.systems:
        values = []
        for column in columns:
            found = [
                cell.interval.value
                for (_, name), cell in table.cells.items()
                if name == column.name
            ]
            cell = table.cells.get((system, column.name))
            values.append(cell.interval.value / (max(found) or 1.0) if cell else 0.0)
        axes.plot([*angles, angles[0]], [*values, values[0]], label=system)
    axes.set_xticks(angles, [column.title for column in columns], fontsize=7)
    axes.set_yticklabels([])
