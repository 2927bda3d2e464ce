"""Checks of one node in a tiny job for `megadistill doctor`; writes one JSON file a node.

Nodes meet only through the shared directory, as a run's do.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megadistill.atomic import write_atomic
from megadistill.launch.node_context import NodeContext, own_job, rendezvous_port, slurm_context

PATIENCE_S = 60.0
ALL_REDUCE_S = 180.0


@dataclass(slots=True, kw_only=True)
class Probe:
    """One node's findings; None where it could not find out."""

    host: str
    canary_s: float | None = None
    """Until a file of every other node was visible here."""
    skew_s: float | None = None
    """Our clock minus that of the file system's server."""
    signal_s: float | None = None
    """From asking Slurm for SIGUSR1 to its arrival."""
    gpus: list[str] | None = None
    """Lines of nvidia-smi: name, memory, uncorrected errors."""
    all_reduce: str = ""
    """What the bandwidth test printed, on node 0, or its last words."""


def probe_task(folder: Path) -> int:
    """Every task of the tiny job."""
    probe_node(folder, slurm_context())
    return 0


def probe_node(folder: Path, context: NodeContext) -> None:
    """All checks of one node, in the same order on each."""
    arrived: list[float] = []

    def note(_number: int, _frame: FrameType | None) -> None:
        arrived.append(time.monotonic())

    signal.signal(signal.SIGUSR1, note)
    probe = Probe(host=context.host)
    begun = time.monotonic()
    own = folder / f"canary-{context.node}"
    own.touch()
    probe.skew_s = time.time() - own.stat().st_mtime
    others = [folder / f"canary-{node}" for node in range(context.num_nodes)]
    if await_all(others):
        probe.canary_s = time.monotonic() - begun
    probe.gpus = gpu_lines()
    if context.job_id is not None:
        probe.signal_s = probe_signal(folder, context, arrived)
    probe_all_reduce(folder, context, probe)
    write_atomic(folder / f"node-{context.node}.json", json.dumps(asdict(probe)), sync=False)


def await_all(files: list[Path]) -> bool:
    """Whether all files came to be, within the patience."""
    return await_true(lambda: all(file.exists() for file in files))


def await_true(happened: Callable[[], bool]) -> bool:
    """Whether it happened within the patience."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def probe_signal(folder: Path, context: NodeContext, arrived: list[float]) -> float | None:
    """Node 0 asks Slurm for the signal that it sends before a time limit; each node times it."""
    (folder / f"ready-{context.node}").touch()
    begun = time.monotonic()
    ready = [folder / f"ready-{node}" for node in range(context.num_nodes)]
    if context.node == 0 and await_all(ready) and shutil.which("scancel") is not None:
        begun = time.monotonic()
        command = ["scancel", "--signal=USR1", own_job(os.environ)]
        subprocess.run(command, check=False, timeout=PATIENCE_S)
    return arrived[0] - begun if await_true(lambda: bool(arrived)) else None


def gpu_lines() -> list[str] | None:
    """One line a GPU, or None where there is no nvidia-smi."""
    fields = "name,memory.total,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return found.stdout.splitlines()


def probe_all_reduce(folder: Path, context: NodeContext, probe: Probe) -> None:
    """One process a node sums a tensor with the others'."""
    meeting = folder / "meeting.json"
    if context.node == 0:
        write_atomic(meeting, json.dumps(rendezvous_port(context, attempt=0)), sync=False)
    elif not await_all([meeting]):
        return
    environment = {
        **os.environ,
        "RANK": str(context.node),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(context.num_nodes),
        "MASTER_ADDR": context.hosts[0],
        "MASTER_PORT": str(json.loads(meeting.read_text())),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "megadistill.megatron.all_reduce"]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=ALL_REDUCE_S,
        )
    except subprocess.TimeoutExpired:
        probe.all_reduce = f"no answer within {ALL_REDUCE_S:.0f} s"
        return
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    probe.all_reduce = lines[-1] if lines else ""
