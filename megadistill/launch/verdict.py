"""When an attempt has ended, and how: node 0 judges, the other nodes heed it."""

import time
from dataclasses import dataclass, field
from typing import Protocol

from megadistill.launch.board import Board, End, Failure, Notice
from megadistill.launch.layout import Layout
from megadistill.launch.place import Place
from megadistill.rundir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
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


class Decider(Protocol):
    """Says when this node's part in the attempt is over."""

    def verdict(self, own: Notice) -> End | None: ...


@dataclass(slots=True, kw_only=True)
class Referee:
    """Node 0: collects every node's notice and decides."""

    run: RunDir
    plan: Layout
    place: Place
    board: Board
    waits: Waits
    _begun: float = field(default_factory=time.monotonic)
    _failed: float | None = None
    """When the first failure was seen; likewise below, by the monotonic clock."""
    _finishing: float | None = None
    _stopping: float | None = None

    def verdict(self, own: Notice) -> End | None:
        notices = {0: own} | {node: self.board.read(node) for node in self.others()}
        self.relay_stop(notices)
        failures = [notice.failure for notice in notices.values() if notice and notice.failure]
        failures += self.lost_nodes() if not failures else []
        if failures:
            return self.failed(failures)
        return self.finished(notices) or self.overdue(notices)

    def others(self) -> range:
        return range(1, self.place.num_nodes)

    def relay_stop(self, notices: dict[int, Notice | None]) -> None:
        """Tell the trainers to save and end when any node was asked to."""
        reasons = [notice.stop for notice in notices.values() if notice and notice.stop]
        if reasons and self._stopping is None:
            self._stopping = time.monotonic()
            self.run.request_stop(reasons[0])

    def lost_nodes(self) -> list[Failure]:
        lost = []
        for node in self.others():
            silent = self.board.silent_s(node)
            waited = time.monotonic() - self._begun
            if silent is None and waited > self.waits.start_s:
                lost.append(self.blame(node, f"has not appeared within {waited:.0f} s"))
            elif silent is not None and silent > self.waits.silence_s:
                lost.append(self.blame(node, f"has shown no sign of life for {silent:.0f} s"))
        return lost

    def failed(self, failures: list[Failure]) -> End | None:
        """The earliest failure is the cause; others may still be on their way here."""
        self._failed = self._failed or time.monotonic()
        if time.monotonic() - self._failed < self.waits.settle_s:
            return None
        cause = min(failures, key=lambda failure: failure.when)
        return End(status="failed", message=cause.what, failure=cause)

    def finished(self, notices: dict[int, Notice | None]) -> End | None:
        """All trainers have ended well: because the run is done, or because it was asked to stop."""
        if self.unfinished(notices):
            return None
        progress = self.run.read_progress()
        at = f"step {progress.get('step', 0)} of {progress.get('steps', '?')}"
        if progress.get("done", False):
            return End(status="done", message=f"done, {at}")
        if self.run.stop_file.exists():
            return End(
                status="stopped", message=f"stopped at {at} ({self.run.stop_file.read_text()})"
            )
        what = f"all trainers ended with exit code 0 at {at}, expected the run to be done"
        return self.over(Failure(node=0, what=what, when=time.time()))

    def unfinished(self, notices: dict[int, Notice | None]) -> list[int]:
        hosting = [node.node for node in self.plan.nodes if node.trainers]
        states = {node: notice.state if notice else None for node, notice in notices.items()}
        return [node for node in hosting if states[node] != "done"]

    def overdue(self, notices: dict[int, Notice | None]) -> End | None:
        """Trainers that neither end nor fail."""
        late = self.unfinished(notices)
        now = time.monotonic()
        if self._finishing is None and any(
            notice is not None and notice.state == "done" and self.plan.nodes[node].trainers
            for node, notice in notices.items()
        ):
            self._finishing = now
        if self._finishing is not None and now - self._finishing > self.waits.drain_s:
            what = (
                f"has trainers that do not end, {self.waits.drain_s:.0f} s after other nodes' did"
            )
            return self.over(self.blame(late[0], what))
        if self._stopping is not None and now - self._stopping > self.waits.stop_s:
            what = (
                f"has trainers that have not ended {self.waits.stop_s:.0f} s after being asked to"
            )
            return self.over(self.blame(late[0], what))
        return None

    def blame(self, node: int, what: str) -> Failure:
        return Failure(
            node=node, what=f"node {node} ({self.place.hosts[node]}) {what}", when=time.time()
        )

    def over(self, failure: Failure) -> End:
        return End(status="failed", message=failure.what, failure=failure)


@dataclass(slots=True, kw_only=True)
class Member:
    """Any other node: heeds node 0, and gives up when that is gone."""

    place: Place
    board: Board
    waits: Waits
    _begun: float = field(default_factory=time.monotonic)
    _failed: float | None = None

    def verdict(self, own: Notice) -> End | None:
        now = time.monotonic()
        if (end := self.board.read_end()) is not None:
            return end
        if own.failure is not None:
            self._failed = self._failed or now
            if now - self._failed > self.waits.settle_s + self.waits.grace_s + 5:
                return End(status="failed", message=own.failure.what, failure=own.failure)
        self.board.read(0)
        silent = self.board.silent_s(0)
        silent = now - self._begun if silent is None else silent
        if silent > self.waits.silence_s:
            what = f"node 0 ({self.place.hosts[0]}) has shown no sign of life for {silent:.0f} s"
            failure = Failure(node=0, what=what, when=time.time())
            return End(status="failed", message=what, failure=failure)
        return None
