"""`megadistill status RUN`: where a run stands, once or until it ends."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megadistill.launch.attempts import (
    NodeSign,
    last_error,
    last_sign,
    last_writes,
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

WAITS_FOR = {
    "not there yet": "`megadistill train` or `megadistill submit train` to make {run}",
    "not started": "its first process",
    "queued": "Slurm",
    "failed": "another attempt (`megadistill train {run}`, or submit it again)",
    "stopped": "another attempt (`megadistill train {run}`, or submit it again)",
    "silent": "a sign of life, see {run}/logs",
}
"""State -> what makes it another."""
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
    begun, could_fail = time.time(), False
    with _screen(run, console or Console()) as update:
        while not _is_done(run):
            update()
            has_failed = run_state(run)[0] == "failed"
            if has_failed and could_fail:  # now, and not before one began to watch
                newest = read_attempts(run)[-1]
                raise ValueError(f"{run.path}: {newest.message}\n{newest.detail}".rstrip())
            could_fail = not has_failed
            written = max(last_sign(run), *last_writes(run).values(), begun)
            if time.time() - written > give_up_s:
                raise ValueError(
                    f"{run.path}: nothing was written for {give_up_s:.0f} s; see its logs/"
                )
            time.sleep(interval_s)
        update()


@contextmanager
def _screen(run: RunDir, console: Console) -> Iterator[Callable[[], None]]:
    """A function that shows what is new: a live view on a terminal, plain lines elsewhere."""
    if console.is_terminal:
        with Live(_view(run), console=console, refresh_per_second=2) as live:
            yield lambda: live.update(_view(run))
    else:
        yield _PlainLines(run, console).update


@dataclass(slots=True)
class _PlainLines:
    """A line for each step, and for what the run waits for."""

    run: RunDir
    console: Console
    _step: int = -1
    _state: str = ""

    def update(self) -> None:
        state, line = _standing(self.run)
        if state != self._state and state in WAITS_FOR:
            self.say(f"{self.run.path.name}: {line.plain}")
        self._state = state
        for row in read_metrics(self.run.metrics_file):
            if row["step"] > self._step:
                self._step = row["step"]
                cells = zip(COLUMNS, _cells(row), strict=True)
                named = "  ".join(f"{heading} {cell}" for (_, heading, _), cell in cells if cell)
                self.say(f"{named}  {_eta(self.run)}")

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _view(run: RunDir) -> RenderableType:
    progress = run.read_progress()
    rows = read_metrics(run.metrics_file)
    steps = run.look_at_config().steps if run.config_file.exists() else "?"
    done, total = progress.get("step", 0), progress.get("steps", steps)
    return Group(
        Text(f"{run.path.name}: step {done} of {total}  {_eta(run)}".rstrip()),
        _bar(done, total if isinstance(total, int) else 1),
        *_troubles(run, rows),
        _last_steps(rows),
    )


def _bar(done: int, total: int) -> Table:
    """On a line of its own."""
    line = Table.grid()
    line.add_row(ProgressBar(total=total, completed=done, width=60))
    return line


def _standing(run: RunDir) -> tuple[str, Text]:
    """The run's state, and a line on it that says what it waits for."""
    state, why = run_state(run) if run.config_file.exists() else ("not there yet", "")
    line = Text.assemble((state, STATE_STYLES.get(state, "bold")), f"  {why}" if why else "")
    if state in WAITS_FOR:
        line.append(f"; waits for {WAITS_FOR[state].format(run=run.path)}")
    return state, line


def _troubles(run: RunDir, rows: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """State, attempts, last error, and the nodes with their roles."""
    state, line = _standing(run)
    attempts = read_attempts(run)
    if attempts:
        ended = Counter(attempt.status for attempt in attempts)
        counted = ", ".join(f"{count} {outcome}" for outcome, count in ended.items())
        line.append(f"  attempts {len(attempts)}: {counted}")
    found: list[RenderableType] = [line]
    error = last_error(run)
    if error and state != "done":
        found.append(Text(f"last error: {error}", style="red"))
    for attempt in [one for one in attempts if one.status != "under way"][-LAST_ATTEMPTS:]:
        at = "" if attempt.step is None else f" at step {attempt.step}"
        found.append(Text(f"attempt {attempt.attempt} {attempt.status}{at}: {attempt.message}"))
    if rows and (memory := rows[-1].get("memory/trainer_gib")) is not None:
        found.append(Text(f"memory of the fullest trainer: {memory:.1f} GiB"))
    if evaluations := read_evaluations(run):
        found.append(Text("; ".join(evaluations)))
    if state != "done" and (nodes := read_nodes(run)):
        found.append(_node_table(nodes))
    return found


def _node_table(nodes: Sequence[NodeSign]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "host", "roles", "state", "last sign"):
        table.add_column(heading)
    for sign in nodes:
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
        branch, _, _ = str(row.get("branch", "")).partition("+")
        value = row.get(key, row.get(f"{branch}/{key}"))
        cells.append("" if value is None else pattern.format(value))
    return cells


def _eta(run: RunDir) -> str:
    """Time left by the mean of the last steps, or what the run is doing before its first."""
    progress = run.read_progress()
    if progress.get("done"):
        return "done"
    times = [
        row["time/step"] + row.get("time/evaluate", 0)
        for row in read_metrics(run.metrics_file)
        if "time/step" in row
    ]
    if not times or "steps" not in progress:
        return str(progress.get("phase", ""))
    recent = times[-LAST_ROWS:]
    seconds = (progress["steps"] - progress["step"]) * sum(recent) / len(recent)
    return f"ETA {int(seconds // 60)}:{int(seconds % 60):02d}"


def _is_done(run: RunDir) -> bool:
    return bool(run.read_progress().get("done"))
