"""Decides when an attempt has ended, and how: node 0 leads, the other nodes follow its outcome."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from megadistill.launch.heartbeats import AttemptOutcome, Failure, Heartbeat, Heartbeats
from megadistill.launch.layout import Layout
from megadistill.launch.node_context import NodeContext
from megadistill.rundir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Bounds on everything a node waits for, in seconds."""

    poll_s: float = 0.2
    """Between two looks at the other nodes; a local process's end is seen at once."""
    heartbeat_s: float = 2.0
    """Between two signs of life."""
    silence_s: float = 120.0
    """Without a sign of life a node is given up; a shared file system may cache for a minute."""
    start_s: float = 300.0
    """For every node of the job to appear."""
    lock_s: float = 10.0
    """For a predecessor on the same run directory to be gone."""
    settle_s: float = 1.0
    """For other failures to be reported, of which the earliest is the cause."""
    grace_s: float = 3.0
    """Between SIGINT and SIGKILL for a role that is ended."""
    drain_s: float = 600.0
    """For all trainers to end well once the first node's have."""
    stop_s: float = 7200.0
    """For the trainers to save and end once asked; Slurm's limits come earlier."""


@dataclass(slots=True, kw_only=True)
class Leader:
    """Node 0: collects every node's heartbeat and decides."""

    run: RunDir
    plan: Layout
    context: NodeContext
    heartbeats: Heartbeats
    timeouts: Timeouts
    _begun: float = field(default_factory=time.monotonic)
    _failed: float | None = None
    """When the first failure was seen; likewise below, by the monotonic clock."""
    _finishing: float | None = None
    _stopping: float | None = None

    def outcome(self, own: Heartbeat) -> AttemptOutcome | None:
        read = {node: self.heartbeats.read(node) for node in self.others()}
        beats = {0: own} | {node: beat for node, beat in read.items() if beat is not None}
        self.relay_stop(beats)
        failures = [beat.failure for beat in beats.values() if beat.failure] or self.lost_nodes()
        if failures:
            return self.failed(failures)
        return self.finished(beats) or self.overdue(beats)

    def others(self) -> range:
        return range(1, self.context.num_nodes)

    def relay_stop(self, beats: Mapping[int, Heartbeat]) -> None:
        """Tell the trainers to save and end when any node was asked to."""
        reasons = [beat.stop for beat in beats.values() if beat.stop]
        if reasons and self._stopping is None:
            self._stopping = time.monotonic()
            self.run.request_stop(reasons[0])

    def lost_nodes(self) -> list[Failure]:
        lost = []
        for node in self.others():
            silent = self.heartbeats.silent_s(node)
            waited = time.monotonic() - self._begun
            if silent is None and waited > self.timeouts.start_s:
                lost.append(self.blame(node, f"has not appeared within {waited:.0f} s"))
            elif silent is not None and silent > self.timeouts.silence_s:
                lost.append(self.blame(node, f"has shown no sign of life for {silent:.0f} s"))
        return lost

    def failed(self, failures: list[Failure]) -> AttemptOutcome | None:
        """The earliest failure is the cause; others may still be on their way here."""
        self._failed = self._failed or time.monotonic()
        if time.monotonic() - self._failed < self.timeouts.settle_s:
            return None
        return min(failures, key=lambda failure: failure.when).outcome()

    def finished(self, beats: Mapping[int, Heartbeat]) -> AttemptOutcome | None:
        """All trainers have ended well: because the run is done, or because it was asked to stop."""
        if self.unfinished(beats):
            return None
        progress = self.run.read_progress()
        at = f"step {progress.get('step', 0)} of {progress.get('steps', '?')}"
        if progress.get("done", False):
            return AttemptOutcome(status="done", message=f"done, {at}")
        if self.run.stop_file.exists():
            return AttemptOutcome(
                status="stopped", message=f"stopped at {at} ({self.run.stop_file.read_text()})"
            )
        what = f"all trainers ended with exit code 0 at {at}, expected the run to be done"
        return Failure(node=0, what=what, when=time.time()).outcome()

    def unfinished(self, beats: Mapping[int, Heartbeat]) -> list[int]:
        hosting = [node.node for node in self.plan.nodes if node.trainers]
        return [node for node in hosting if node not in beats or beats[node].state != "done"]

    def overdue(self, beats: Mapping[int, Heartbeat]) -> AttemptOutcome | None:
        """Trainers that neither end nor fail."""
        late = self.unfinished(beats)
        now = time.monotonic()
        ended = [node for node, beat in beats.items() if beat.state == "done"]
        if self._finishing is None and any(self.plan.nodes[node].trainers for node in ended):
            self._finishing = now
        if self._finishing is not None and now - self._finishing > self.timeouts.drain_s:
            what = f"has trainers that do not end, {self.timeouts.drain_s:.0f} s after other nodes' did"
            return self.blame(late[0], what).outcome()
        if self._stopping is not None and now - self._stopping > self.timeouts.stop_s:
            what = f"has trainers that have not ended {self.timeouts.stop_s:.0f} s after being asked to"
            return self.blame(late[0], what).outcome()
        return None

    def blame(self, node: int, what: str) -> Failure:
        return Failure(
            node=node, what=f"node {node} ({self.context.hosts[node]}) {what}", when=time.time()
        )


@dataclass(slots=True, kw_only=True)
class Follower:
    """Any other node: takes node 0's outcome, and gives up when node 0 is gone."""

    context: NodeContext
    heartbeats: Heartbeats
    timeouts: Timeouts
    _begun: float = field(default_factory=time.monotonic)
    _failed: float | None = None

    def outcome(self, own: Heartbeat) -> AttemptOutcome | None:
        now = time.monotonic()
        if (end := self.heartbeats.read_outcome()) is not None:
            return end
        if own.failure is not None:
            self._failed = self._failed or now
            if now - self._failed > self.timeouts.settle_s + self.timeouts.grace_s + 5:
                return own.failure.outcome()
        self.heartbeats.read(0)
        silent = self.heartbeats.silent_s(0)
        silent = now - self._begun if silent is None else silent
        if silent > self.timeouts.silence_s:
            what = f"node 0 ({self.context.hosts[0]}) has shown no sign of life for {silent:.0f} s"
            return Failure(node=0, what=what, when=time.time()).outcome()
        return None


Supervisor = Leader | Follower
"""Says when this node's part in the attempt is over."""
