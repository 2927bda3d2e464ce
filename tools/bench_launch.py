"""Seconds from a start to the first optimizer step, and from a kill to the next.

    python tools/bench_launch.py configs/embedded/camopd_medical.yaml evaluate.every=0

Runs `megadistill train` on this machine in a run directory of its own, kills all of it after its
first checkpoint, starts it again, and prints a Markdown table of what each start spent its time on.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megadistill.config import RunConfig, load
from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir, is_whole

PATIENCE_S = 900.0
LOADED = "run directory "
"""What rank 0 logs once its models, data and checkpoint are loaded."""


def main() -> None:
    """Two starts and a kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megadistill-launch-") as folder:
        overrides = [
            *options.overrides,
            f"runs_dir={folder}",
            "checkpoint.every=1",
            'log.wandb="off"',
        ]
        config = load(RunConfig, options.config, overrides)
        run = RunDir.of(config)
        engines = config.rollout.engines if config.rollout else 0
        print("| | first start | start after a kill |\n| --- | --- | --- |")
        starts = [watch_start(run, [options.config, *overrides], engines, step) for step in (1, 2)]
    for name, seconds in starts[0].items():
        print(f"| {name} | {seconds:.1f} | {starts[1][name]:.1f} |")


def watch_start(run: RunDir, words: list[str], engines: int, step: int) -> dict[str, float]:
    """Start the run, and kill it when `step` is saved; seconds since the start, by event."""
    begun = time.time()
    command = [sys.executable, "-m", "megadistill", "train", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def after(happened: Callable[[], bool]) -> float:
        while not happened():
            assert process.poll() is None, f"the run ended, see {run.path}/logs"
            assert time.time() - begun < PATIENCE_S, "waited in vain"
            time.sleep(0.02)
        return time.time() - begun

    log = run.log_file("trainer-0", step - 1)
    files = [run.engine_file(index) for index in range(engines)]
    try:
        seconds = {"roles start": after(log.exists)}
        listening: dict[Path, float] = {}

        def look() -> bool:
            for file in files:
                if file.exists() and file.stat().st_mtime > begun:
                    listening.setdefault(file, time.time() - begun)
            return LOADED in log.read_text(errors="replace")

        seconds["trainers have loaded"] = after(look)
        seconds["engines listen"] = after(lambda: look() and len(listening) == engines)
        seconds["engines listen"] = max(listening.values(), default=0.0)
        logged = after(lambda: any(row["step"] == step for row in read_metrics(run.metrics_file)))
        row = next(row for row in read_metrics(run.metrics_file) if row["step"] == step)
        seconds["the step begins"] = logged - row["time/step"]
        seconds["the step is logged"] = logged
        seconds |= {
            f"of the step: {name}": row.get(f"time/{name}", 0.0)
            for name in ("rollout", "score", "train", "publish")
        }
        after(lambda: is_whole(run.checkpoint(step)))
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher's guard ends the roles
        process.wait()
    return seconds


if __name__ == "__main__":
    main()
