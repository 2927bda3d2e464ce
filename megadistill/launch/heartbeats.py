"""Heartbeats: small files in the run directory by which the nodes of an attempt know of each other.

    control/lock                 held by node 0 as long as it works on the run
    control/launch.json          what node 0 decided; the others wait for the one of their launch
    control/attempt-2/node-1.json  rewritten by node 1 every few seconds: a sign of life and its state
    control/attempt-2/ended.json   node 0's outcome, after which every node ends

Each file has one writer. Nothing compares clocks: a node is silent when its file stops changing.
"""

import errno
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megadistill.atomic import write_atomic
from megadistill.config import RunConfig, dump
from megadistill.launch.node_context import NodeContext
from megadistill.launch.roles import Launch
from megadistill.launch.shared_files import held_lock, read_as, read_json
from megadistill.rundir import RunDir

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""The run directory is full. What a node says of itself must not fail by it: the roles' own errors
name the cause, and node 0 still has to requeue the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt cannot go on."""

    node: int
    """Where it was noticed."""
    what: str
    """One line that names the culprit."""
    when: float
    """Seconds since the epoch; the earliest failure of all nodes is taken for the cause."""
    detail: str = ""
    """The last lines of the culprit's log."""

    def outcome(self) -> "AttemptOutcome":
        """Of an attempt that fails by it."""
        return AttemptOutcome(status="failed", message=self.what, failure=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a node says of itself."""

    beat: int = 0
    """Grows with every write."""
    state: Literal["running", "done", "failed"] = "running"
    """`done`: all trainers of this node ended well."""
    stop: str | None = None
    """Why this node was asked to have the run saved and ended."""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOutcome:
    """What node 0 declares of the attempt."""

    status: Literal["done", "stopped", "failed"]
    message: str
    failure: Failure | None = None
    """The culprit of a failed attempt."""


@dataclass(slots=True)
class Heartbeats:
    """The heartbeats of one attempt, as seen and written by one node."""

    directory: Path
    node: int
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    _written: float = 0.0
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Last beat of another node and when it was first seen, by our monotonic clock."""

    def post(self, heartbeat: Heartbeat, every_s: float) -> None:
        """Write our heartbeat when it says something new, or when the last is `every_s` old."""
        if heartbeat == self.heartbeat and time.monotonic() - self._written < every_s:
            return
        self.heartbeat = replace(heartbeat, beat=self.heartbeat.beat + 1)
        written = self._replace(self.heartbeat_file(self.node), asdict(self.heartbeat))
        self._written = time.monotonic() if written else 0.0  # tried again at the next look

    def read(self, node: int) -> Heartbeat | None:
        """Another node's latest heartbeat; None before its first."""
        heartbeat = read_as(Heartbeat, self.heartbeat_file(node))
        if heartbeat is None:
            return None
        if self._seen.get(node, (None, 0.0))[0] != heartbeat.beat:
            self._seen[node] = (heartbeat.beat, time.monotonic())
        return heartbeat

    def silent_s(self, node: int) -> float | None:
        """Seconds since the node's heartbeat last changed; None when it has never been there."""
        return time.monotonic() - self._seen[node][1] if node in self._seen else None

    def declare_outcome(self, end: AttemptOutcome) -> None:
        self._replace(self.outcome_file, asdict(end))

    def read_outcome(self) -> AttemptOutcome | None:
        return read_as(AttemptOutcome, self.outcome_file)

    def _replace(self, file: Path, values: dict[str, Any]) -> bool:
        """False when the disk is full: the node then falls silent, and the others end without it.

        Not flushed to the disk: it need not survive a crash, and a busy disk takes a minute.
        """
        try:
            write_atomic(file, json.dumps(values), sync=False)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return False
        return True

    @property
    def outcome_file(self) -> Path:
        return self.directory / "ended.json"

    def heartbeat_file(self, node: int) -> Path:
        return self.directory / f"node-{node}.json"


def attempt_directory(run: RunDir, attempt: int) -> Path:
    """Where the nodes of an attempt meet."""
    return run.path / "control" / f"attempt-{attempt}"


def await_launch(run: RunDir, context: NodeContext, timeout_s: float) -> Launch:
    """The other nodes: wait for node 0 of the same launch."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        launch = read_as(Launch, launch_file(run))
        if launch is not None and launch.launch_id == context.launch_id:
            return launch
        time.sleep(0.1)
    raise RuntimeError(
        f"node {context.node} ({context.host}): waited {timeout_s:.0f} s for node 0 "
        f"({context.hosts[0]}) to begin launch {context.launch_id} in {launch_file(run)}; "
        "is the run directory on a file system that all nodes share?"
    )


def launch_file(run: RunDir) -> Path:
    """Where node 0 writes its `Launch`."""
    return run.path / "control" / "launch.json"


def create_run(run: RunDir, config: RunConfig) -> None:
    """Create a run that is submitted, or change its settings, unless somebody is at work on it."""
    if run.config_file.exists() and run.config_file.read_text() == dump(config):
        return
    with sole_owner(run, wait_s=0.0):
        run.create(config)


@contextmanager
def sole_owner(run: RunDir, wait_s: float) -> Iterator[None]:
    """Node 0: hold the run's lock, so that two jobs cannot work on one run directory.

    A predecessor that is just dying is waited for.
    """
    run.make_directories()

    def busy() -> str:
        values = read_json(launch_file(run)) or {}
        return (
            f"{run.path}: found launch {values.get('launch_id', 'of another process')} at "
            "work on this run, expected none; wait for it, cancel it, or change `name`"
        )

    with held_lock(run.path / "control" / "lock", wait_s, busy):
        yield
