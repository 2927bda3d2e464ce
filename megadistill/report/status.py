"""`megadistill status RUN`: where a run stands, once or until it ends."""

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir

COLUMNS = (
    ("step", "step", "{:d}"),
    ("branch", "phase", "{}"),
    ("loss", "loss", "{:+.4f}"),
    ("gap", "gap", "{:+.3f}"),
    ("selected_fraction", "selected", "{:.0%}"),
    ("grad_norm", "grad norm", "{:.2f}"),
    ("rollout/tokens_per_s", "rollout tok/s", "{:.0f}"),
    ("train/tokens_per_s", "train tok/s", "{:.0f}"),
    ("time/step", "s/step", "{:.1f}"),
)
"""Metric, heading, format; a branch's metric is found under its branch's name."""

LAST_ROWS = 8


def show(run: RunDir, console: Console) -> None:
    """Print the state of a run once."""
    console.print(_view(run))


def watch(run: RunDir, console: Console, interval_s: float, give_up_s: float) -> bool:
    """Show the run until it is done; False when it has not moved for `give_up_s` seconds."""
    if not console.is_terminal:
        return _watch_lines(run, console, interval_s, give_up_s)
    with Live(_view(run), console=console, refresh_per_second=2) as live:
        while True:
            live.update(_view(run))
            if _is_done(run):
                return True
            if _is_silent(run, give_up_s):
                return False
            time.sleep(interval_s)


def _watch_lines(run: RunDir, console: Console, interval_s: float, give_up_s: float) -> bool:
    """For logs and pipes: one plain line a step, as it happens."""
    seen = -1
    while True:
        done = _is_done(run)
        for row in read_metrics(run.metrics_file):
            if row["step"] > seen:
                seen = row["step"]
                cells = zip(COLUMNS, _cells(row), strict=True)
                line = "  ".join(f"{heading} {cell}" for (_, heading, _), cell in cells if cell)
                console.print(f"{line}  {_eta(run)}", highlight=False, soft_wrap=True)
        if done:
            return True
        if _is_silent(run, give_up_s):
            return False
        time.sleep(interval_s)


def _view(run: RunDir) -> RenderableType:
    progress = run.read_progress()
    rows = read_metrics(run.metrics_file)
    table = Table(box=None, pad_edge=False)
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows[-LAST_ROWS:]:
        table.add_row(*_cells(row))
    done, total = progress.get("step", 0), progress.get("steps", 0) or 1
    head = Text(f"{run.path.name}: step {done} of {total}  {_eta(run)}  ")
    return Group(head, ProgressBar(total=total, completed=done, width=60), table)


def _cells(row: dict[str, Any]) -> list[str]:
    """Formatted values of one step; empty where a step has no such metric."""
    cells = []
    for key, _, pattern in COLUMNS:
        value = row.get(key, row.get(f"{row['branch']}/{key}"))
        cells.append("" if value is None else pattern.format(value))
    return cells


def _eta(run: RunDir) -> str:
    """Time left by the mean of the last steps, or what the run is doing before its first."""
    progress = run.read_progress()
    if not progress:
        return "starting"
    if progress["done"]:
        return "done"
    times = [
        row["time/step"] + row.get("time/evaluate", 0)
        for row in read_metrics(run.metrics_file)
        if "time/step" in row
    ]
    if not times:
        return str(progress["phase"])
    recent = times[-LAST_ROWS:]
    seconds = (progress["steps"] - progress["step"]) * sum(recent) / len(recent)
    return f"ETA {int(seconds // 60)}:{int(seconds % 60):02d}"


def _is_done(run: RunDir) -> bool:
    return bool(run.read_progress().get("done"))


def _is_silent(run: RunDir, give_up_s: float) -> bool:
    """Whether nothing was written to the run's logs or progress for that long."""
    files = [run.progress_file, run.metrics_file, *(run.path / "logs").glob("*")]
    newest = max((file.stat().st_mtime for file in files if file.exists()), default=None)
    return newest is not None and time.time() - newest > give_up_s
