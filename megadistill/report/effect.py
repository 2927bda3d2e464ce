"""The effect of a run: held-out quantities before its first step and after its last, and its curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from megadistill.metrics import read_metrics
from megadistill.plots import save_png
from megadistill.report.curves import heldout_names, measured_rows, run_curves
from megadistill.rundir import RunDir

QUANTITIES = {
    "reverse_kl": "student ‖ teacher",
    "forward_kl": "teacher ‖ student",
    "nll": "reference answers",
}
"""Divergences to a teacher, and the negative log-likelihood of reference answers."""
IN_PICTURE = ("heldout", "gap_absolute", "selected_fraction")
"""Of the curves."""
HEADS = ("held out", "nats per token", "before", "after", "change")


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
    rows = measured_rows(read_metrics(run.metrics_file))
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


def effect_table(found: Sequence[Effect]) -> pd.DataFrame:
    """Before against after, with standard errors."""
    rows = [
        (
            effect.name,
            effect.direction,
            f"{effect.before:.4f} ± {effect.before_error:.4f}",
            f"{effect.after:.4f} ± {effect.after_error:.4f}",
            effect.change,
        )
        for effect in found
    ]
    return pd.DataFrame(rows, columns=HEADS)


def effect_picture(run: RunDir, file: Path) -> Path:
    """Draw held-out curves, training gap, and selection by step; returns `file` (PNG)."""
    curves = run_curves(read_metrics(run.metrics_file))
    return save_png(file, [curves[name] for name in IN_PICTURE], run.path.name)
