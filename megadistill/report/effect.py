"""The effect of a run: held-out quantities before its first step and after its last, and its curves."""

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
PARTS = ("", "_stderr")
IN_PICTURE = ("heldout", "gap_absolute", "selected_fraction")
"""Of the curves."""
HEADS = ("held out", "nats per token", "before", "after", "change")


def effects(run: RunDir) -> pd.DataFrame:
    """Every held-out quantity, in nats per token, that the first and the last measurement have."""
    rows = measured_rows(read_metrics(run.metrics_file))
    columns = ["name", "direction", "before", "before_error", "after", "after_error"]
    found = [
        (name, label, *(row[f"{key}{part}"] for row in (rows[0], rows[-1]) for part in PARTS))
        for name in heldout_names(rows)
        for quantity, label in QUANTITIES.items()
        if (key := f"heldout/{name}/{quantity}") in rows[0] and key in rows[-1]
    ]
    return pd.DataFrame(found, columns=columns)


def effect_table(found: pd.DataFrame) -> pd.DataFrame:
    """Before against after, with standard errors."""
    rows = [
        (
            one.name,
            one.direction,
            f"{one.before:.4f} ± {one.before_error:.4f}",
            f"{one.after:.4f} ± {one.after_error:.4f}",
            _change(one.before, one.after),
        )
        for one in found.itertuples(index=False)
    ]
    return pd.DataFrame(rows, columns=HEADS)


def effect_picture(run: RunDir, file: Path) -> Path:
    """Draw held-out curves, training gap, and selection by step; returns `file` (PNG)."""
    curves = run_curves(read_metrics(run.metrics_file))
    return save_png(file, [curves[name] for name in IN_PICTURE], run.path.name)


def _change(before: float, after: float) -> str:
    """Relative, or absolute where it began at zero."""
    return f"{(after - before) / before:+.0%}" if before > 1e-6 else f"{after - before:+.4f}"
