"""The attempts of a run, why each ended, and whether its nodes are alive now.

Everything is read from the run directory; a file that is not there yet says nothing.
"""

import re
import subprocess
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from megadistill.launch.attempt_log import Attempt, attempt_numbers, left_by, read_ended
from megadistill.launch.heartbeats import AttemptOutcome, Heartbeats, attempt_directory, launch_file
from megadistill.launch.node_context import ask_slurm
from megadistill.launch.roles import Launch
from megadistill.launch.shared_files import read_as, read_json
from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir

SILENT_S = 120.0
"""Without a sign of life for as long, a node is shown as silent."""
STEP_PATIENCE_S, START_PATIENCE_S = 600.0, 1800.0
"""Without a word of its trainers for as long, a run is shown as silent, though its nodes live."""
LAST_STEPS = 5
SQUEUE_TIMEOUT_S = 5
QUEUE_EVERY_S = 10.0

State = Literal[
    "not started",
    "queued",
    "starting",
    "running",
    "stopping",
    "stopped",
    "silent",
    "failed",
    "done",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSign:
    """A node of the latest attempt: what it runs and when it was last heard of."""

    node: int
    host: str
    roles: str
    state: str
    age_s: float | None
    """Since its last sign of life; None before the first."""


def read_attempts(run: RunDir) -> list[Attempt]:
    """Every attempt, oldest first."""
    ended, latest = read_ended(run), _latest_attempt(run)
    known = {*range(run.num_attempts), *ended, *last_writes(run), *attempt_numbers(run)}
    under_way = {latest} if latest is not None and _outcome(run, latest) is None else set()
    return [
        Attempt(attempt=number, status="under way", message="")
        if number in under_way
        else ended.get(number) or left_by(run, number)
        for number in sorted(known)
    ]


def run_state(run: RunDir) -> tuple[State, str]:
    """Where the run stands, and a word on why."""
    if run.read_progress().get("done"):
        return "done", ""
    attempt = _latest_attempt(run)
    if attempt is None:
        found = queue_state(run)
        return ("queued", found) if found else ("not started", "")
    end = _outcome(run, attempt)
    if end:
        state: State = "failed" if end.status == "failed" else "stopped"
        return state, " ".join(part for part in (end.message, queue_state(run)) if part)
    ages = [node.age_s for node in read_nodes(run) if node.age_s is not None]
    if ages and min(ages) > SILENT_S:
        queued = queue_state(run)
        silent = f"no sign of life for {min(ages):.0f} s"
        return ("queued", f"{silent}; {queued}") if queued else ("silent", silent)
    if run.stop_file.exists():
        return "stopping", run.stop_file.read_text()
    began = _modified(launch_file(run)) or 0.0
    has_begun = run.read_progress().get("updated", 0.0) >= began
    quiet = time.time() - max(last_sign(run), began)
    if quiet > _patience_s(run, has_begun):
        return "silent", f"its nodes are alive, but its trainers wrote nothing for {quiet:.0f} s"
    return ("running" if has_begun else "starting"), f"attempt {attempt}"


def last_sign(run: RunDir) -> float:
    """When a trainer last wrote, to its log, the metrics or the progress; 0 before that."""
    logs = (run.path / "logs").glob("trainer-*.log")
    files = [run.progress_file, run.metrics_file, *logs]
    return max(_modified(file) or 0.0 for file in files)


def _patience_s(run: RunDir, has_begun: bool) -> float:
    """So long may trainers write nothing: some steps, of which none is short."""
    last = read_metrics(run.metrics_file)[-LAST_STEPS:] if has_begun else []
    times = [row["time/step"] + row.get("time/evaluate", 0.0) for row in last if "time/step" in row]
    return max(STEP_PATIENCE_S, LAST_STEPS * max(times)) if times else START_PATIENCE_S


def read_nodes(run: RunDir) -> list[NodeSign]:
    """The nodes of the latest attempt; none before the first."""
    launch = read_as(Launch, launch_file(run))
    if launch is None:
        return []
    heartbeats = Heartbeats(directory=attempt_directory(run, launch.attempt), node=0)
    signs = []
    for node, (host, roles) in enumerate(zip(launch.hosts, launch.roles, strict=True)):
        heartbeat = heartbeats.read(node)
        written = _modified(heartbeats.heartbeat_file(node))
        age = None if written is None else max(time.time() - written, 0.0)
        state: str = heartbeat.state if heartbeat else "not there yet"
        if state == "running" and age is not None and age > SILENT_S:
            state = "silent"
        signs.append(NodeSign(node=node, host=host, roles=roles, state=state, age_s=age))
    return signs


def last_error(run: RunDir) -> str | None:
    """The reason of the newest failed attempt, with what is known of it."""
    failed = [attempt for attempt in read_attempts(run) if attempt.status == "failed"]
    if not failed:
        return None
    newest = failed[-1]
    at = "" if newest.step is None else f" at step {newest.step}"
    last = [line for line in newest.detail.splitlines() if line.strip()][-1:]
    return ": ".join([f"attempt {newest.attempt}{at}", newest.message, *last])


def queue_state(run: RunDir) -> str:
    """What Slurm's queue says of the run's newest job; empty where it says nothing."""
    job = _job_id(run)
    if job is None:
        return ""
    return _ask_queue(job, int(time.monotonic() / QUEUE_EVERY_S))


@lru_cache(maxsize=1)
def _ask_queue(job: str, moment: int) -> str:
    """What Slurm says of a job; `moment` is another when it is time to ask again."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T (%r)"]
    try:
        answer = ask_slurm(command, check=False, timeout_s=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):  # no Slurm here, or one that is busy
        return ""
    lines = answer.stdout.splitlines()
    if not lines or not lines[0].startswith(("PENDING", "CONFIGURING", "REQUEUE")):
        return ""
    return f"job {job} is {lines[0].strip()}"


def _job_id(run: RunDir) -> str | None:
    """Slurm's number of the newest job known to the run: submitted, or seen at work."""
    submitted = sorted((run.path / "jobs").glob("*/*_submitted.pkl"))
    launch = read_json(launch_file(run)) or {}
    launched = re.match(r"(\d+)-", str(launch.get("launch_id")))
    numbers = [int(submitted[-1].name.split("_")[0])] if submitted else []
    numbers += [int(launched[1])] if launched else []
    return str(max(numbers)) if numbers else None


def _latest_attempt(run: RunDir) -> int | None:
    return max(attempt_numbers(run), default=None)


def _outcome(run: RunDir, attempt: int) -> AttemptOutcome | None:
    return Heartbeats(directory=attempt_directory(run, attempt), node=0).read_outcome()


def last_writes(run: RunDir) -> dict[int, float]:
    """Attempt -> when the last of its logs was written to."""
    times: dict[int, float] = {}
    for file in (run.path / "logs").glob("*.log"):
        number = file.suffixes[-2].removeprefix(".") if len(file.suffixes) > 1 else ""
        modified = _modified(file)
        if number.isdigit() and modified is not None:
            times[int(number)] = max(times.get(int(number), 0.0), modified)
    return times


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None
