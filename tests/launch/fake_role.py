"""Stands in for a trainer or an engine: writes what it was given, then plays its part.

python fake_role.py RUN_DIR ROLE; the part is in RUN_DIR/parts/ROLE, one word and its arguments:

    work STEPS      (a trainer's default) count steps in state/progress.json, heed the stop file
    serve           (an engine's default) announce itself and wait to be ended
    crash SECONDS   print a traceback-like line and end with 3
    die SECONDS     kill itself with SIGKILL
    blame SECONDS   name a mistake of the user's, as trainers do, and end with 2
    stubborn        ignore SIGINT, with a child that does too

Names of other roles after the first argument: play once those run.
"""

# ruff: noqa: T201 - what it prints is its log
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SEEN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MEGADISTILL_HOST",
    "MEGADISTILL_ATTEMPT",
)


def main() -> int:
    run, name = Path(sys.argv[1]), sys.argv[2]
    attempt = os.environ["MEGADISTILL_ATTEMPT"]
    seen = {key: os.environ.get(key) for key in SEEN}
    publish(run / "logs" / f"seen-{name}.{attempt}.json", {**seen, "pid": os.getpid()})
    part = run / "parts" / name
    default = "work 3" if name.startswith("trainer") else "serve"
    verb, *arguments = (part.read_text() if part.exists() else default).split()
    print(f"{name} plays {verb}", flush=True)
    others = [run / "logs" / f"seen-{role}.{attempt}.json" for role in arguments[1:]]
    while not all(file.exists() for file in others):
        time.sleep(0.02)
    if verb == "work":
        return work(run, name, int(arguments[0]))
    if verb == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        publish(run / "logs" / f"child-{name}.json", {"pid": child.pid})
    if verb in ("serve", "stubborn"):
        time.sleep(600)
    time.sleep(float(arguments[0]))
    if verb == "blame":
        print("megadistill: data.pools: found none\n  expected one", flush=True)
        return 2
    if verb == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print(f"{name}: NoLuckError: out of luck", flush=True)
    return 3


def work(run: Path, name: str, steps: int) -> int:
    """Rank 0 counts on from the step it finds, as a resumed run does; the others follow it."""
    progress = run / "state" / "progress.json"
    if name != "trainer-0":
        while not (read(progress).get("done") or (run / "control" / "stop").exists()):
            time.sleep(0.02)
        return 0
    for step in range(read(progress).get("step", 0), steps):
        time.sleep(0.1)
        done = step + 1 == steps
        publish(progress, {"step": step + 1, "steps": steps, "done": done})
        print(f"step {step + 1}", flush=True)
        if (run / "control" / "stop").exists():
            print("saved", flush=True)
            return 0
    return 0


def publish(file: Path, values: dict[str, object]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(file)


def read(file: Path) -> dict[str, int]:
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
