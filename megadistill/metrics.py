"""Metrics of a run: one JSON line a step, and the same numbers to Weights & Biases."""

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megadistill.atomic import write_atomic
from megadistill.config.schema import LogConfig

log = logging.getLogger(__name__)


class MetricWriter:
    """Appends to `metrics.jsonl`: line n is the state after n optimizer steps, 0 before the first.

    A resumed run first drops the lines it is about to repeat.
    """

    def __init__(self, file: Path, config: LogConfig, name: str, steps_taken: int) -> None:
        """`WANDB_MODE` in the environment wins over `log.wandb`, as for every user of wandb."""
        self._file = file
        kept = [row for row in read_metrics(file) if row["step"] <= steps_taken and steps_taken]
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in kept))
        self._wandb: Any = None  # wandb has no types
        if config.wandb != "off":
            run_id = wandb_id(file.parent / "state" / "wandb-id", anew=steps_taken == 0)
            with self._only_warned():
                self._wandb = _start_wandb(config, name, run_id, file.parent)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """One line for `step`; it is on disk when this returns."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        if self._wandb is not None:
            with self._only_warned():
                # With a step metric of our own: what a resumed run repeats would be dropped as old.
                self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Hand everything over; more than once does no harm."""
        if self._wandb is not None:
            with self._only_warned():
                self._wandb.finish()
            self._wandb = None

    @contextmanager
    def _only_warned(self) -> Iterator[None]:
        """Whatever Weights & Biases stumbles over (no login, no network) does not end the run."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - its errors are of many kinds
            self._wandb = None
            log.warning("Weights & Biases is left out from here on: %s", error)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; a torn last line (the writer was killed) is left out."""
    return [row for row in read_json_lines(file) if "step" in row]


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line (any: JSON); lines that were cut are left out."""
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def wandb_id(file: Path, *, anew: bool) -> str:
    """What Weights & Biases knows this run by: random, so that no other run of its name has it."""
    if anew or not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")


def _start_wandb(config: LogConfig, name: str, run_id: str, directory: Path) -> Any:
    import wandb  # noqa: PLC0415 - slow to import; only the writer of a logged run needs it

    os.environ.setdefault("WANDB_SILENT", "true")
    online_or_not: Literal["online", "offline"] = (
        "online" if config.wandb == "online" else "offline"
    )
    started = wandb.init(
        project=config.project,
        name=name,
        id=run_id,
        resume="allow",
        dir=str(directory),
        mode=None if "WANDB_MODE" in os.environ else online_or_not,
        settings=wandb.Settings(console="off", x_disable_stats=True),
    )
    started.define_metric("*", step_metric="step")
    return started
