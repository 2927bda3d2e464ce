"""`megadistill status RUN`: where a run stands, once or until it ends."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megadistill.launch.attempts import (
    failure_since,
    last_error,
    read_attempts,
    read_nodes,
    run_state,
)
from megadistill.launch.on_export import read_evaluations
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
LAST_ATTEMPTS = 3

STATE_STYLES = {"done": "bold green", "running": "green", "failed": "bold red", "silent": "red"}


def show(run: RunDir, console: Console | None = None) -> None:
    """Print the state of a run once."""
    (console or Console()).print(_view(run))


def watch(
    run: RunDir, console: Console | None = None, *, interval_s: float, give_up_s: float
) -> None:
    """Show the run until it is done, from before its first process has started.

    Raises `ValueError` when its attempt failed, or when nothing moved for `give_up_s` seconds.
    """
    begun = time.time()
    seen = -1
    with _screen(run, console or Console()) as update:
        while not _is_done(run):
            seen = update(seen)
            _raise_failure(run, begun)
            if time.time() - max(_last_sign(run), begun) > give_up_s:
                raise ValueError(
                    f"{run.path}: nothing was written for {give_up_s:.0f} s; see its logs/"
                )
            time.sleep(interval_s)
        update(seen)


@contextmanager
def _screen(run: RunDir, console: Console) -> Iterator[Callable[[int], int]]:
    """A function that shows what is new: a live view on a terminal, a plain line a step elsewhere."""
    if console.is_terminal:
        with Live(_view(run), console=console, refresh_per_second=2) as live:

            def redraw(seen: int) -> int:
                live.update(_view(run))
                return seen

            yield redraw
        return

    def print_new(seen: int) -> int:
        for row in read_metrics(run.metrics_file):
            if row["step"] > seen:
                seen = row["step"]
                cells = zip(COLUMNS, _cells(row), strict=True)
                line = "  ".join(f"{heading} {cell}" for (_, heading, _), cell in cells if cell)
                console.print(f"{line}  {_eta(run)}", highlight=False, soft_wrap=True)
        return seen

    yield print_new


def _raise_failure(run: RunDir, since: float) -> None:
    """Raise what an attempt that ended after `since` failed by, if one did."""
    if end := failure_since(run, since):
        detail = end.failure.detail if end.failure else ""
        raise ValueError(f"{run.path}: {end.message}\n{detail}".rstrip())


def _view(run: RunDir) -> RenderableType:
    progress = run.read_progress()
    rows = read_metrics(run.metrics_file)
    done, total = progress.get("step", 0), progress.get("steps")
    parts: list[RenderableType] = [
        Text(f"{run.path.name}: step {done} of {total or '?'}  {_eta(run)}  "),
        _bar(done, total or 1),
        *_standing(run, rows),
        _last_steps(rows),
    ]
    return Group(*parts)


def _bar(done: int, total: int) -> Table:
    """On a line of its own."""
    line = Table.grid()
    line.add_row(ProgressBar(total=total, completed=done, width=60))
    return line


def _standing(run: RunDir, rows: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """State, attempts, last error, and the nodes with their roles."""
    state, why = run_state(run)
    line = Text.assemble((state, STATE_STYLES.get(state, "bold")), f"  {why}" if why else "")
    attempts = read_attempts(run)
    if attempts:
        ended = Counter(attempt.outcome for attempt in attempts)
        counted = ", ".join(f"{count} {outcome}" for outcome, count in ended.items())
        line.append(f"  attempts {len(attempts)}: {counted}")
    found: list[RenderableType] = [line]
    error = last_error(run)
    if error and state != "done":
        found.append(Text(f"last error: {error}", style="red"))
    for attempt in [one for one in attempts if one.outcome != "under way"][-LAST_ATTEMPTS:]:
        at = "" if attempt.step is None else f" at step {attempt.step}"
        found.append(Text(f"attempt {attempt.number} {attempt.outcome}{at}: {attempt.reason}"))
    if rows and (memory := rows[-1].get("memory/trainer_gib")) is not None:
        found.append(Text(f"memory of the fullest trainer: {memory:.1f} GiB"))
    if evaluations := read_evaluations(run):
        found.append(Text("; ".join(evaluations)))
    if run.config_file.exists() and state not in ("done", "not started"):
        found.append(_node_table(run))
    return found


def _node_table(run: RunDir) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "host", "roles", "state", "last sign"):
        table.add_column(heading)
    for sign in read_nodes(run):
        age = "" if sign.age_s is None else f"{sign.age_s:.0f} s ago"
        state = Text(sign.state, style=STATE_STYLES.get(sign.state, ""))
        table.add_row(str(sign.node), Text(sign.host), Text(sign.roles), state, age)
    return table


def _last_steps(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows[-LAST_ROWS:]:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    """Formatted values of one step; empty where a step has no such metric."""
    cells = []
    for key, _, pattern in COLUMNS:
        value = row.get(key, row.get(f"{row['branch'].split('+')[0]}/{key}"))
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


def _last_sign(run: RunDir) -> float:
    """When something last wrote to the run's logs, metrics or progress; 0 before that."""
    files = [run.progress_file, run.metrics_file, *(run.path / "logs").glob("*")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
