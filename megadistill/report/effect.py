"""What a run did: a table of before against after, and the picture of its curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir

QUANTITIES = {
    "reverse_kl": "student ‖ teacher",
    "forward_kl": "teacher ‖ student",
    "nll": "reference answers",
}
"""Divergences to a teacher, and the negative log-likelihood of reference answers."""
BRANCH_COLOURS = {"general": "#1f77b4", "domain": "#d62728"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One held-out quantity before the first step and after the last, in nats per token."""

    name: str
    direction: str
    before: float
    before_error: float
    after: float
    after_error: float

    @property
    def change(self) -> str:
        """Relative, or absolute where it began at zero."""
        difference = self.after - self.before
        return f"{difference / self.before:+.0%}" if self.before > 1e-6 else f"{difference:+.4f}"


def effects(run: RunDir) -> list[Effect]:
    """Every held-out quantity that was measured at the first and at the last measurement."""
    rows = measured_rows(run)
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    return [
        Effect(
            name=name,
            direction=label,
            before=first[key],
            before_error=first[f"{key}_stderr"],
            after=last[key],
            after_error=last[f"{key}_stderr"],
        )
        for name in heldout_names(rows)
        for quantity, label in QUANTITIES.items()
        if (key := f"heldout/{name}/{quantity}") in first and key in last
    ]


def effect_table(run: RunDir) -> Table:
    """Held-out quantities before the first step and after the last, with standard errors."""
    table = Table(title=f"{escape(run.path.name)}: held out, nats per token")
    for heading in ("held out", "direction", "before", "after", "change"):
        table.add_column(
            heading, justify="left" if heading in ("held out", "direction") else "right"
        )
    for effect in effects(run):
        table.add_row(
            effect.name,
            effect.direction,
            f"{effect.before:.4f} ± {effect.before_error:.4f}",
            f"{effect.after:.4f} ± {effect.after_error:.4f}",
            effect.change,
        )
    return table


def effect_picture(run: RunDir, file: Path) -> Path:
    """Draw held-out curves, training gap, and selection by step; returns `file` (PNG)."""
    import matplotlib  # noqa: PLC0415 - slow to import, needed only here

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    rows = read_metrics(run.metrics_file)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    _draw_heldout(axes[0], measured_rows(run))
    _draw_branches(axes[1], rows, "gap_absolute", "mean |gap| of the batch (nats)")
    _draw_branches(axes[2], rows, "selected_fraction", "selected fraction")
    axes[2].set_ylim(0, 1.05)
    figure.suptitle(run.path.name)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def heldout_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the held-out measurements in the metrics."""
    return sorted({key.split("/")[1] for row in rows for key in row if key.startswith("heldout/")})


def measured_rows(run: RunDir) -> list[dict[str, Any]]:
    """Metric rows that hold a held-out measurement, first the one before training."""
    rows = read_metrics(run.metrics_file)
    return [row for row in rows if any(key.startswith("heldout/") for key in row)]


def _draw_heldout(axis: Any, rows: Sequence[dict[str, Any]]) -> None:  # matplotlib has no types
    steps = [row["step"] for row in rows]
    for name in heldout_names(rows):
        key = f"heldout/{name}/reverse_kl"
        if key not in rows[0]:
            continue
        values = [row[key] for row in rows]
        errors = [row[f"{key}_stderr"] for row in rows]
        colour = BRANCH_COLOURS.get(name)
        axis.errorbar(
            steps, values, errors, marker="o", capsize=3, label=f"to {name} teacher", color=colour
        )
    axis.set(xlabel="optimizer steps", ylabel="held-out KL(student ‖ teacher), nats/token")
    _finish_axis(axis)


def _draw_branches(axis: Any, rows: Sequence[dict[str, Any]], metric: str, label: str) -> None:
    for branch, colour in BRANCH_COLOURS.items():
        points = [(row["step"], row[key]) for row in rows if (key := f"{branch}/{metric}") in row]
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", label=branch, color=colour)
    axis.set(xlabel="optimizer steps", ylabel=label)
    _finish_axis(axis)


def _finish_axis(axis: Any) -> None:
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:  # a run may have nothing to show here
        axis.legend()
