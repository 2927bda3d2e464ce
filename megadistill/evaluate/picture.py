"""The picture of a table: bars by benchmark, and a radar where there are enough of them."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megadistill.evaluate.tables import Table

RADAR_FROM = 3
"""Fewer axes make no shape."""


def draw_bars(table: Table, file: Path) -> Path:
    """Bars with intervals and, from three benchmarks on, a radar beside them."""
    radar = len(table.columns) >= RADAR_FROM
    width = 2.0 + 1.2 * len(table.columns) + (4.5 if radar else 0)
    figure = Figure(figsize=(width, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    _bars(figure.add_subplot(1, 1 + radar, 1), table)
    if radar:
        _radar(figure.add_subplot(1, 2, 2, projection="polar"), table)
    figure.savefig(file, dpi=120)
    return file


def _bars(axes: Any, table: Table) -> None:  # matplotlib has no types
    width = 0.8 / len(table.systems)
    for number, system in enumerate(table.systems):
        for at, column in enumerate(table.columns):
            cell = table.cells.get((system, column.name))
            if cell is None:
                continue
            value = 100 * cell.interval.value
            errors = [[value - 100 * cell.interval.low], [100 * cell.interval.high - value]]
            axes.bar(
                at + (number - (len(table.systems) - 1) / 2) * width,
                value,
                width,
                yerr=np.maximum(errors, 0).tolist(),
                color=f"C{number}",
                capsize=2,
                label=system if at == 0 else None,
            )
    axes.set_xticks(range(len(table.columns)), [column.title for column in table.columns])
    axes.tick_params(axis="x", rotation=20)
    axes.set_ylabel("score (points)")
    axes.legend(fontsize=8)


def _radar(axes: Any, table: Table) -> None:
    """Each axis from 0 to the best score of its benchmark."""
    angles = np.linspace(0, 2 * np.pi, len(table.columns), endpoint=False).tolist()
    for system in table.systems:
        values = []
        for column in table.columns:
            found = [
                cell.interval.value
                for (_, name), cell in table.cells.items()
                if name == column.name
            ]
            cell = table.cells.get((system, column.name))
            values.append(cell.interval.value / (max(found) or 1.0) if cell else 0.0)
        axes.plot([*angles, angles[0]], [*values, values[0]], label=system)
    axes.set_xticks(angles, [column.title for column in table.columns], fontsize=7)
    axes.set_yticklabels([])
