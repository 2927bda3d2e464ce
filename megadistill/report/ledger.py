"""The cost of a run: seconds, tokens and GPU-hours of each phase and its teachers.

Steps that a resumed attempt repeated count once, as the metrics hold them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megadistill.config import RunConfig
from megadistill.metrics import read_metrics
from megadistill.rundir import WHOLE, RunDir

ACTIVITIES = ("rollout", "score", "train", "publish", "evaluate")
"""Parts of a step that are measured, as `time/...`; a step's rest is `other`."""

Row = Mapping[str, Any]  # one line of metrics


@dataclass(slots=True, kw_only=True)
class Cost:
    """What one phase has cost."""

    phase: str
    teachers: str
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    other_s: float = 0.0
    """Within steps, but none of the activities."""
    save_s: float | None = None
    """Known of the whole run only."""
    hidden_s: float = 0.0
    """Sampling that went on while the trainer worked (`max_staleness: 1`)."""
    rollout_tokens: float = 0.0
    trained_tokens: float = 0.0
    gpus: int = 0

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values()) + self.other_s + (self.save_s or 0.0)

    @property
    def gpu_hours(self) -> float | None:
        return self.gpus * self.total_s / 3600 if self.gpus else None

    @property
    def rollout_tokens_per_s(self) -> float | None:
        """Tokens per second of sampling, hidden or waited for."""
        return _rate(self.rollout_tokens, self.seconds["rollout"] + self.hidden_s)

    @property
    def trained_tokens_per_s(self) -> float | None:
        return _rate(self.trained_tokens, self.seconds["train"])

    def add(self, row: Row) -> None:
        for name in ACTIVITIES:
            self.seconds[name] += row.get(f"time/{name}", 0.0)
        self.other_s += other_seconds(row)
        self.hidden_s += row.get("time/rollout_hidden", 0.0)
        self.rollout_tokens += row.get("rollout/tokens", 0.0)
        self.trained_tokens += row.get("train/tokens", 0.0)
        self.steps += row["step"] > 0


def cost_ledger(run: RunDir, config: RunConfig) -> list[Cost]:
    """The costs phase by phase, in the order of their first step, and last of the whole run."""
    rows = read_metrics(run.metrics_file)
    gpus = allocated_gpus(config)
    total = Cost(phase="all", teachers="", gpus=gpus, save_s=save_seconds(run, config, rows))
    phases: dict[str, Cost] = {}
    for row in rows:
        phase = str(row.get("branch", "?"))
        if phase not in phases:
            phases[phase] = Cost(phase=phase, teachers=teachers_of(config, phase), gpus=gpus)
        phases[phase].add(row)
        total.add(row)
    return [*phases.values(), total]


def other_seconds(row: Row) -> float:
    """Of a step's wall-clock time what no activity accounts for."""
    if "time/step" not in row:
        return 0.0
    known: float = sum(row.get(f"time/{name}", 0.0) for name in ACTIVITIES if name != "evaluate")
    return max(float(row["time/step"]) - known, 0.0)


def timeline(rows: Sequence[Row]) -> list[tuple[str, list[float]]]:
    """(step, seconds of each activity and the rest) of each step."""
    return [
        (
            str(row["step"]),
            [*(row.get(f"time/{name}", 0.0) for name in ACTIVITIES), other_seconds(row)],
        )
        for row in rows
    ]


def teachers_of(config: RunConfig, phase: str) -> str:
    """Names of the teachers that the branches of a phase ask."""
    branches = config.algorithm.branches
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


def _rate(tokens: float, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None
