"""The attempts of a run, why each ended, and whether its nodes are alive now.

Everything is read from the run directory; a file that is torn or not there yet says nothing.
"""

import json
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megadistill.config import RunConfig
from megadistill.launch.failures import FAILURES
from megadistill.launch.heartbeats import ATTEMPTS
from megadistill.launch.layout import Layout, layout
from megadistill.launch.node import gpus_per_node
from megadistill.launch.node_context import ask_slurm
from megadistill.launch.shards import ShardFolder
from megadistill.rundir import RunDir

SILENT_S = 120.0
"""Without a sign of life for as long, a node is shown as silent."""
SQUEUE_TIMEOUT_S = 5
LOST = "it was requeued, or its job was lost"

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
Values = dict[str, Any]  # JSON of the run directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of the run's processes."""

    number: int
    outcome: str
    """`done`, `stopped`, `failed`, `under way`, or `interrupted`: it left no verdict."""
    reason: str
    step: int | None = None
    """Steps the run had taken when it ended."""
    last_sign: float | None = None
    """When its last log was written to, seconds since the epoch."""
    detail: str = ""
    """The culprit's last lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSign:
    """A node of the latest attempt: what it runs and when it was last heard of."""

    node: int
    host: str
    roles: str
    state: str
    age_s: float | None
    """Since its last sign of life; None before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How far the work is that an export has started."""

    export: str
    shards: int
    done: int
    failed: int

    def describe(self) -> str:
        trouble = f", {self.failed} failed" if self.failed else ""
        return f"{self.export}: {self.done} of {self.shards} done{trouble}"


def read_attempts(run: RunDir) -> list[Attempt]:
    """Every attempt, oldest first."""
    failures = {row["attempt"]: row for row in json_lines(run.path / "state" / FAILURES)}
    kept = {row["attempt"]: row for row in json_lines(run.path / "state" / ATTEMPTS)}
    signs = _last_writes(run)
    latest = _latest_attempt(run)
    counted = _read(run.path / "state" / "attempts.json").get("attempts", 0)
    known = {*range(counted), *failures, *signs, *([] if latest is None else [latest])}
    attempts = []
    for number in sorted(known):
        end = _end(run, number) or kept.get(number, {})
        if number in failures:  # also one that was requeued, whose verdict is then "stopped"
            outcome, reason = "failed", end.get("message") or failures[number]["error"]
        elif end:
            outcome, reason = end["status"], end["message"] or LOST
        elif number == latest:
            outcome, reason = "under way", ""
        else:
            outcome, reason = "interrupted", LOST
        attempts.append(
            Attempt(
                number=number,
                outcome=outcome,
                reason=reason,
                step=failures.get(number, end).get("step"),
                last_sign=signs.get(number),
                detail=(end.get("failure") or {}).get("detail", ""),
            )
        )
    return attempts


def run_state(run: RunDir) -> tuple[State, str]:
    """Where the run stands, and a word on why."""
    if run.read_progress().get("done"):
        return "done", ""
    attempt = _latest_attempt(run)
    if attempt is None:
        found = queue_state(run)
        return ("queued", found) if found else ("not started", "")
    end = _end(run, attempt)
    if end:
        state: State = "failed" if end["status"] == "failed" else "stopped"
        return state, " ".join(part for part in (end["message"], queue_state(run)) if part)
    ages = [age for file in _node_files(run, attempt) if (age := _age(file)) is not None]
    if ages and min(ages) > SILENT_S:
        queued = queue_state(run)
        silent = f"no sign of life for {min(ages):.0f} s"
        return ("queued", f"{silent}; {queued}") if queued else ("silent", silent)
    if run.stop_file.exists():
        return "stopping", _text(run.stop_file)
    began = _modified(run.path / "control" / "launch.json") or 0.0
    if run.read_progress().get("updated", 0.0) < began:
        return "starting", f"attempt {attempt}"
    return "running", f"attempt {attempt}"


def read_nodes(run: RunDir, config: RunConfig) -> list[NodeSign]:
    """The nodes of the latest attempt, or those the configuration asks for."""
    attempt = _latest_attempt(run)
    files = [] if attempt is None else _node_files(run, attempt)
    numbers = [int(file.stem.removeprefix("node-")) for file in files]
    count = max(numbers, default=-1) + 1 or config.cluster.nodes
    plan = _layout(config, count)
    hosts = _hosts(run, plan)
    signs = []
    for node in range(count):
        file = run.path / "control" / f"attempt-{attempt}" / f"node-{node}.json"
        age = _age(file)
        state = str(_read(file).get("state", "not there yet"))
        if state == "running" and age is not None and age > SILENT_S:
            state = "silent"
        signs.append(
            NodeSign(
                node=node,
                host=hosts.get(node, ""),
                roles=_roles(plan, node),
                state=state,
                age_s=age,
            )
        )
    return signs


def read_evaluations(run: RunDir) -> list[Evaluation]:
    """The work that exports have started, in the order of their steps."""
    found = []
    every = (run.path / "evaluations").glob("*")
    for root in sorted(every, key=lambda path: (path.name == "final", path.name)):
        work = run.load_config().checkpoint.on_export
        shards = [ShardFolder(path) for path in (root / "shards").glob("*")]
        done = [shard for shard in shards if shard.done_file.exists()]
        over = [shard for shard in shards if work and not shard.has_work(work.tries)]
        found.append(
            Evaluation(
                export=root.name,
                shards=len(shards),
                done=len(done),
                failed=max(len(over) - len(done), 0),
            )
        )
    return found


def last_error(run: RunDir) -> str | None:
    """The reason of the newest failed attempt, with what is known of it."""
    failed = [attempt for attempt in read_attempts(run) if attempt.outcome == "failed"]
    if not failed:
        return None
    newest = failed[-1]
    at = "" if newest.step is None else f" at step {newest.step}"
    return f"attempt {newest.number}{at}: {newest.reason}"


def queue_state(run: RunDir) -> str:
    """What Slurm's queue says of the run's newest job; empty where it says nothing."""
    job = _job_id(run)
    if job is None:
        return ""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T (%r)"]
    try:
        answer = ask_slurm(command, check=False, timeout_s=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):  # no Slurm here, or one that is busy
        return ""
    lines = answer.stdout.splitlines()
    if not lines or not lines[0].startswith(("PENDING", "CONFIGURING", "REQUEUE")):
        return ""
    return f"job {job} is {lines[0].strip()}"


def json_lines(file: Path) -> list[Values]:
    """The objects of a file with one a line; lines that were cut are left out."""
    rows = []
    for line in _text(file).splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _job_id(run: RunDir) -> str | None:
    """Slurm's number of the newest job known to the run: submitted, or seen at work."""
    submitted = sorted((run.path / "jobs").glob("*/*_submitted.pkl"))
    launched = re.match(r"(\d+)-", str(_read(run.path / "control/launch.json").get("launch_id")))
    numbers = [int(submitted[-1].name.split("_")[0])] if submitted else []
    numbers += [int(launched[1])] if launched else []
    return str(max(numbers)) if numbers else None


def _layout(config: RunConfig, nodes: int) -> Layout | None:
    try:
        return layout(config, nodes, gpus_per_node(config))
    except ValueError:  # not all of its nodes have appeared, or a heterogeneous job
        return None


def _roles(plan: Layout | None, node: int) -> str:
    if plan is None or node >= len(plan.nodes):
        return "?"
    own = plan.nodes[node]
    parts = []
    for kind, roles in (("trainer", own.trainers), ("engine", own.engines)):
        if roles:
            numbers = [role.index for role in roles]
            several = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
            gpus = sorted({gpu for role in roles for gpu in role.gpus})
            parts.append(f"{kind} {several}" + (f" on GPU {_span(gpus)}" if gpus else ""))
    return ", ".join(parts) or "idle"


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _hosts(run: RunDir, plan: Layout | None) -> dict[int, str]:
    """Names of the nodes that the run directory mentions."""
    hosts = {}
    for node in plan.nodes if plan else ():
        for engine in node.engines:
            if host := _read(run.engine_file(engine.index)).get("host"):
                hosts[node.node] = str(host)
    if first := _read(run.path / "control" / "launch.json").get("master_addr"):
        hosts[0] = str(first)
    return hosts


def _latest_attempt(run: RunDir) -> int | None:
    found = [
        int(directory.name.removeprefix("attempt-"))
        for directory in (run.path / "control").glob("attempt-*")
    ]
    return max(found, default=None)


def _node_files(run: RunDir, attempt: int) -> list[Path]:
    return sorted((run.path / "control" / f"attempt-{attempt}").glob("node-*.json"))


def _end(run: RunDir, attempt: int) -> Mapping[str, Any]:
    return _read(run.path / "control" / f"attempt-{attempt}" / "ended.json")


def _last_writes(run: RunDir) -> dict[int, float]:
    """Attempt -> when the last of its logs was written to."""
    times: dict[int, float] = {}
    for file in (run.path / "logs").glob("*.log"):
        number = file.suffixes[-2].removeprefix(".") if len(file.suffixes) > 1 else ""
        modified = _modified(file)
        if number.isdigit() and modified is not None:
            times[int(number)] = max(times.get(int(number), 0.0), modified)
    return times


def _read(file: Path) -> Mapping[str, Any]:
    """The file's object; empty while it is not there or not whole."""
    try:
        values = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _age(file: Path) -> float | None:
    modified = _modified(file)
    return None if modified is None else max(time.time() - modified, 0.0)
