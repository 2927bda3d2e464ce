"""Metrics of a run: one JSON line a step, and the same numbers to Weights & Biases."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadistill.config.schema import LogConfig
from megadistill.rundir import write_atomic


class MetricWriter:
    """Appends to `metrics.jsonl`: line n is the state after n optimizer steps, 0 before the first.

    A resumed run first drops the lines it is about to repeat.
    """

    def __init__(self, file: Path, log: LogConfig, name: str, steps_taken: int) -> None:
        self._file = file
        kept = [row for row in read_metrics(file) if row["step"] <= steps_taken and steps_taken]
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in kept))
        self._wandb: Any = None  # wandb has no types
        if log.wandb != "off":
            run_id = wandb_id(file.parent / "state" / "wandb-id", anew=steps_taken == 0)
            self._wandb = _start_wandb(log, name, run_id, file.parent)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """One line for `step`; it is on disk when this returns."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; a torn last line (the writer was killed) is left out."""
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def wandb_id(file: Path, *, anew: bool) -> str:
    """What Weights & Biases knows this run by: random, so that no other run of its name has it."""
    if anew or not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")


def _start_wandb(log: LogConfig, name: str, run_id: str, directory: Path) -> Any:
    import wandb  # noqa: PLC0415 - slow to import; only the writer of a logged run needs it

    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(
        project=log.project,
        name=name,
        id=run_id,
        resume="allow",
        dir=str(directory),
        mode="online" if log.wandb == "online" else "offline",
        settings=wandb.Settings(console="off", x_disable_stats=True),
    )
