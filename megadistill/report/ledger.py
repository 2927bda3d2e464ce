"""The cost of a run: seconds, tokens and GPU-hours of each phase and its teachers.

Steps that a resumed attempt repeated count once, as the metrics hold them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from megadistill.config import RunConfig
from megadistill.metrics import read_metrics
from megadistill.rundir import WHOLE, RunDir

ACTIVITIES = ("rollout", "score", "train", "publish", "evaluate")
"""Parts of a step that are measured, as `time/...`; a step's rest is `other`."""
SECONDS = (*(f"{name} s" for name in ACTIVITIES), "other s")
LEDGER = {
    "steps": ",.0f",
    **dict.fromkeys((*SECONDS, "save s", "total s", "hidden rollout s"), ",.1f"),
    **dict.fromkeys(("rollout tokens", "rollout tokens per s"), ",.0f"),
    **dict.fromkeys(("trained tokens", "trained tokens per s"), ",.0f"),
    "GPU-hours": ",.2f",
}
"""Column -> how its numbers are shown."""

Row = Mapping[str, Any]  # one line of metrics


def cost_ledger(run: RunDir, config: RunConfig) -> pd.DataFrame:
    """The costs phase by phase, in the order of their first step, and last of the whole run.

    NaN where nothing is known: of the speed of what did not happen, of GPUs on a CPU, of the seconds
    of saving within a phase.
    """
    rows = read_metrics(run.metrics_file)
    taken = spent(rows)
    phases = pd.Series([str(row.get("branch", "?")) for row in rows], dtype=str)
    costs = taken.groupby(phases, sort=False).sum()
    costs.loc["all"] = taken.sum()
    save_s = save_seconds(run, config, rows)
    costs["save s"] = [math.nan] * (len(costs) - 1) + [math.nan if save_s is None else save_s]
    costs["total s"] = costs[[*SECONDS, "save s"]].sum(axis=1)
    sampling = costs["rollout s"] + costs["hidden rollout s"]  # hidden or waited for
    costs["rollout tokens per s"] = costs["rollout tokens"] / sampling
    costs["trained tokens per s"] = costs["trained tokens"] / costs["train s"]
    costs["GPU-hours"] = (allocated_gpus(config) or math.nan) * costs["total s"] / 3600
    costs["teacher"] = [teachers_of(config, phase) or "-" for phase in costs.index]
    return costs.replace(math.inf, math.nan)


def ledger_table(costs: pd.DataFrame) -> pd.DataFrame:
    """The ledger as people read it."""
    numbers = {
        name: ["-" if math.isnan(value) else format(value, pattern) for value in costs[name]]
        for name, pattern in LEDGER.items()
    }
    return pd.DataFrame({"phase": costs.index, "teacher": list(costs.teacher), **numbers})


def spent(rows: Sequence[Row]) -> pd.DataFrame:
    """Of each step the seconds by activity and of the rest, and tokens."""
    keys = {f"{name} s": f"time/{name}" for name in ACTIVITIES} | {
        "hidden rollout s": "time/rollout_hidden",  # while the trainer worked (`max_staleness: 1`)
        "rollout tokens": "rollout/tokens",
        "trained tokens": "train/tokens",
    }
    frame = pd.DataFrame(rows)
    found = pd.DataFrame({name: frame.get(key) for name, key in keys.items()}, index=frame.index)
    found = found.astype(float).fillna(0.0)
    found["steps"] = [float(row["step"] > 0) for row in rows]
    known = found[[f"{name} s" for name in ACTIVITIES if name != "evaluate"]].sum(axis=1)
    step_s = frame.get("time/step", known)
    found["other s"] = (step_s - known).clip(lower=0).fillna(0.0)
    return found


def teachers_of(config: RunConfig, phase: str) -> str:
    """Names of the teachers that the branches of a phase ask."""
    branches = config.algorithm.all_branches()
    named = [branches[name].teacher for name in phase.split("+") if name in branches]
    return ", ".join(dict.fromkeys(named))


def allocated_gpus(config: RunConfig) -> int:
    """GPUs the job asks for; 0 for a CPU run."""
    cluster = config.cluster
    if config.device == "cpu":
        return 0
    if cluster.rollout_gpus_per_node is None:
        return cluster.nodes * cluster.gpus_per_node
    first = cluster.nodes - cluster.rollout_nodes
    return first * cluster.gpus_per_node + cluster.rollout_nodes * cluster.rollout_gpus_per_node


def save_seconds(run: RunDir, config: RunConfig, rows: Sequence[Row]) -> float | None:
    """Seconds in checkpoints: the mean of those that are kept, times how many were written.

    A step's rollouts are written right before its checkpoint begins, its marker when that ends.
    """
    seconds = []
    for directory in run.checkpoints():
        after, before = (
            directory / WHOLE,
            run.rollout_file(int(directory.name.removeprefix("step-"))),
        )
        if after.exists() and before.exists():
            took = after.stat().st_mtime - before.stat().st_mtime
            seconds += [took] if took >= 0 else []
    last = max((row["step"] for row in rows), default=0)
    saves = last // config.checkpoint.every + (
        last == config.steps and last % config.checkpoint.every > 0
    )
    return saves * sum(seconds) / len(seconds) if seconds else None
