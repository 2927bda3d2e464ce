"""The processes of one node: started apart from Slurm's signals, watched, and ended by pid.

Slurm signals every process of a job step, so a warning meant for the node process would kill the
roles. They start with SIGUSR1 and SIGTERM blocked; the node process decides, and ends them with
SIGINT, then SIGKILL. Each role leads a session of its own, so its children end with it.
"""

import errno
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megadistill.launch import orphan_killer

SHIELDED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
TAIL_LINES = 20
TAIL_BYTES = 32768
UNKILLABLE_S = 60.0
MISTAKE = 2
"""Exit code of a role that a mistake of the user's has ended; what it says of it comes last."""
SAYS = "megadistill: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """A role that has ended."""

    name: str
    code: int
    """Exit code; minus the signal's number when a signal killed it."""
    log: Path

    def describe(self) -> str:
        if self.code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.code).name}"
        return f"{self.name} ended with exit code {self.code}"

    def mistake(self) -> str:
        """What the user can mend, in the role's own words; empty where it ended otherwise."""
        return self.tail().rpartition(SAYS)[2] if self.code == MISTAKE else ""

    def tail(self) -> str:
        """The last lines of its log."""
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


@dataclass(slots=True)
class Processes:
    """Starts roles and reports their ends in the order in which they happened."""

    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    # Not a SimpleQueue: its timed get() never returns when a signal interrupts it late.
    _exits: "queue.Queue[Exit]" = field(default_factory=queue.Queue)
    _guard: "subprocess.Popen[str] | None" = None

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start a role with both its outputs in `log`. Only from the main thread."""
        with shielded(), log.open("wb") as stream:
            self._guard = self._guard or start_guard()
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._tell_guard("add", process.pid)
        self.running[name] = process
        waiter = threading.Thread(target=self._wait_for, args=(name, process.pid, log), daemon=True)
        waiter.start()

    def next_exit(self, timeout_s: float) -> Exit | None:
        """The next role to have ended, or None after `timeout_s`; its children end with it."""
        try:
            ended = self._exits.get(timeout=timeout_s)
        except queue.Empty:
            return None
        process = self.running.pop(ended.name)
        kill_group(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        process.wait()
        self._tell_guard("drop", process.pid)
        return ended

    def end(self, grace_s: float) -> None:
        """End all that run: SIGINT, `grace_s` to comply, SIGKILL."""
        for process in self.running.values():
            kill_group(process.pid, signal.SIGINT)
        self._drain(grace_s)
        for process in self.running.values():
            kill_group(process.pid, signal.SIGKILL)
        self._drain(UNKILLABLE_S)
        if self.running:
            raise RuntimeError(f"found {', '.join(self.running)} alive a minute after SIGKILL")

    def close(self) -> None:
        """End the guard; what it still has on its list dies."""
        if self._guard is not None:
            self._guard.communicate(timeout=UNKILLABLE_S)
            self._guard = None

    def _drain(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.running and (left := deadline - time.monotonic()) > 0:
            self.next_exit(left)

    def _wait_for(self, name: str, pid: int, log: Path) -> None:
        """In a thread of its own: see the end without reaping, so that the order is kept."""
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert result is not None
        exited = result.si_code == os.CLD_EXITED
        code = result.si_status if exited else -result.si_status
        self._exits.put(Exit(name=name, code=code, log=log))

    def _tell_guard(self, verb: str, pid: int) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{verb} {pid}\n")
        self._guard.stdin.flush()


@contextmanager
def shielded() -> Iterator[None]:
    """What is started inside has Slurm's signals blocked; here they wait until the end."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_guard() -> "subprocess.Popen[str]":
    """The process that outlives this one just long enough to kill what it started."""
    command = [sys.executable, "-I", "-S", orphan_killer.__file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def kill_group(pid: int, number: signal.Signals) -> None:
    """Signal a role and its children; a role that has ended in the meantime is no error."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def show(text: str) -> None:
    """Write to this process's output, which may be a terminal that is gone."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise


def say(text: str) -> None:
    """A line in this process's output."""
    show(f"{text}\n")


@dataclass(slots=True)
class LogFollower:
    """Copies what is added to a log file to this process's own output."""

    log: Path
    _position: int = 0

    def copy(self) -> None:
        if not self.log.exists():  # with all of the run
            return
        with self.log.open("rb") as stream:
            stream.seek(self._position)
            fresh = stream.read()
        if fresh:
            self._position += len(fresh)
            show(fresh.decode(errors="replace"))
