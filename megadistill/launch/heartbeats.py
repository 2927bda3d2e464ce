"""Heartbeats: small files in the run directory by which the nodes of an attempt know of each other.

    control/lock                 held by node 0 as long as it works on the run
    control/launch.json          what node 0 decided; the others wait for the one of their launch
    control/attempt-2/node-1.json  rewritten by node 1 every few seconds: a sign of life and its state
    control/attempt-2/ended.json   node 0's outcome, after which every node ends

What is left of an earlier attempt when the next begins is a line of state/attempts.jsonl: how it ended
and why. Each file has one writer. Nothing compares clocks: a node is silent when its file stops changing.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megadistill.atomic import write_atomic
from megadistill.config import RunConfig, dump
from megadistill.launch.node_context import NodeContext, rendezvous_port
from megadistill.launch.roles import Launch
from megadistill.metrics import read_json_lines
from megadistill.rundir import RunDir

ATTEMPTS = "attempts.jsonl"
"""In state/: a line for each attempt that another has followed."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptOutcome:
    """What is left of an attempt when another follows it."""

    attempt: int
    status: str
    """As node 0 declared, or `interrupted`."""
    message: str
    step: int
    """Steps the run had taken."""


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
        values = read_json(self.heartbeat_file(node))
        if values is None:
            return None
        heartbeat = Heartbeat(**values | {"failure": read_failure(values)})
        if self._seen.get(node, (None, 0.0))[0] != heartbeat.beat:
            self._seen[node] = (heartbeat.beat, time.monotonic())
        return heartbeat

    def silent_s(self, node: int) -> float | None:
        """Seconds since the node's heartbeat last changed; None when it has never been there."""
        return time.monotonic() - self._seen[node][1] if node in self._seen else None

    def declare_outcome(self, end: AttemptOutcome) -> None:
        self._replace(self.outcome_file, asdict(end))

    def read_outcome(self) -> AttemptOutcome | None:
        values = read_json(self.outcome_file)
        return (
            None if values is None else AttemptOutcome(**values | {"failure": read_failure(values)})
        )

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


def read_failure(values: dict[str, Any]) -> Failure | None:
    """The `failure` of a heartbeat or an outcome read back."""
    return Failure(**values["failure"]) if values["failure"] else None


def attempt_directory(run: RunDir, attempt: int) -> Path:
    """Where the nodes of an attempt meet."""
    return run.path / "control" / f"attempt-{attempt}"


def begin_launch(run: RunDir, context: NodeContext) -> Launch:
    """Node 0: begin an attempt and tell the other nodes."""
    attempt = run.begin_attempt()
    keep_outcomes(run, attempt)
    attempt_directory(run, attempt).mkdir(mode=0o700)
    launch = Launch(
        launch_id=context.launch_id,
        attempt=attempt,
        master_addr=context.hosts[0],
        master_port=rendezvous_port(context, attempt),
    )
    write_atomic(launch_file(run), json.dumps(asdict(launch)))
    return launch


def keep_outcomes(run: RunDir, attempt: int) -> None:
    """Note how earlier attempts ended, and delete their files but those of the newest.

    A node of that one may still be about to read its outcome.
    """
    noted = read_kept_outcomes(run)
    for old in (run.path / "control").glob("attempt-*"):
        number = int(old.name.removeprefix("attempt-"))
        if number not in noted:
            keep_outcome(run, Heartbeats(directory=old, node=0))
        if number < attempt - 1:
            shutil.rmtree(old)


def keep_outcome(run: RunDir, heartbeats: Heartbeats) -> None:
    """Note how an attempt ended: by node 0's outcome, or as one that left none."""
    end = heartbeats.read_outcome()
    if end is None:
        last = [read_json(file) for file in sorted(heartbeats.directory.glob("node-*.json"))]
        reasons = [str(beat["stop"]) for beat in last if beat and beat["stop"]]
        status, message = "interrupted", reasons[0] if reasons else ""
    else:
        status, message = end.status, end.message
    kept = KeptOutcome(
        attempt=int(heartbeats.directory.name.removeprefix("attempt-")),
        status=status,
        message=message,
        step=run.read_progress().get("step", 0),
    )
    with (run.path / "state" / ATTEMPTS).open("a") as stream:
        stream.write(json.dumps(asdict(kept)) + "\n")


def read_kept_outcomes(run: RunDir) -> dict[int, KeptOutcome]:
    """Attempt -> how it ended, of those that another has followed."""
    rows = read_json_lines(run.path / "state" / ATTEMPTS)
    return {row["attempt"]: KeptOutcome(**row) for row in rows}


def await_launch(run: RunDir, context: NodeContext, timeout_s: float) -> Launch:
    """The other nodes: wait for node 0 of the same launch."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        values = read_json(launch_file(run))
        if values is not None and values["launch_id"] == context.launch_id:
            return Launch(**values)
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

    The kernel drops it with the process; a predecessor that is just dying is waited for.
    """
    run.make_directories()
    with (run.path / "control" / "lock").open("w") as lock:
        deadline = time.monotonic() + wait_s
        while not try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                values = read_json(launch_file(run)) or {}
                raise ValueError(
                    f"{run.path}: found launch {values.get('launch_id', 'of another process')} at "
                    "work on this run, expected none; wait for it, cancel it, or change `name`"
                )
            time.sleep(0.1)
        yield


def try_lock(handle: int) -> bool:
    """False when somebody else has the lock; True also where the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def read_json(file: Path) -> dict[str, Any] | None:
    """The file's values (any: it is JSON), or None while it is not there."""
    try:
        with file.open("rb") as stream:
            values: dict[str, Any] = json.loads(os.read(stream.fileno(), 1 << 20))
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:  # replaced on another host while we opened it
            raise
        return None
    return values
