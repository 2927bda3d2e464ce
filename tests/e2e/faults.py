"""What can happen to a run on a cluster: each fault is done to a real job of a local Slurm.

The faults hit one job after another, each while the run takes its steps; what counts is that every
later step is that of a run which nothing disturbed. How many steps that will be depends on the
machine, so the run has no last step until all faults are done, and the undisturbed one comes after it.
`tools/chaos.py` draws from the same table.
"""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir, is_whole
from tests.e2e.local_slurm import ASK_EVERY_S, LOCAL_CLUSTER, Cluster, wait_until
from tests.e2e.small_run import finish, start, train_command, write_run

PATIENCE_S = 420.0
HANG_TIMEOUT_S = 30
"""`rollout.timeout_s` of the disturbed run: how long an engine may be silent."""
DISK_MIB = 64
MANY_STEPS = 100_000
Row = tuple[int, float, float]  # step, loss, gradient norm


@dataclass
class Disturbed:
    """A run of two trainers and an engine as a job of two nodes, and what has been done to it."""

    cluster: Cluster
    folder: Path
    """Holds the models, and the mount `disk` with the run directory."""
    job: str = ""
    lost_lines: set[int] = field(default_factory=set)
    """Steps whose line of metrics a fault destroyed."""
    asked: float = 0.0
    """When Slurm was last asked whether the job lives, by the monotonic clock."""
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "disk" / "disturbed")

    @property
    def log(self) -> Path:
        return self.folder / "job.log"

    def submit(self, steps: int = MANY_STEPS) -> None:
        config = write_config(self.folder, "disturbed", steps, runs="disk")
        self.job = self.cluster.call(
            *("sbatch", "--parsable", "--nodes=2", f"--output={self.log}"),
            *("slurm/camopd_medical.sh", str(config), f"rollout.timeout_s={HANG_TIMEOUT_S}"),
        )

    @property
    def step(self) -> int:
        return max((row["step"] for row in read_metrics(self.run.metrics_file)), default=0)

    @property
    def attempts(self) -> int:
        return len(list((self.run.path / "logs").glob("trainer-0.*.log")))

    def rows(self) -> list[Row]:
        rows = read_metrics(self.run.metrics_file)
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["step"]]

    def wait(self, happened: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Until something is so; a job that has failed shows its output."""

        def look() -> bool:
            if happened():
                return True
            if time.monotonic() - self.asked < ASK_EVERY_S:
                return False
            self.asked = time.monotonic()
            return not self.alive()

        wait_until(look, self.tail, patience_s)
        assert happened(), f"the job ended as {self.cluster.state(self.job)}: {self.tail()}"

    def alive(self) -> bool:
        return not self.job or self.state() not in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

    def state(self) -> str:
        """Empty while the controller does not answer."""
        try:
            return self.cluster.state(self.job)
        except AssertionError:
            return ""

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else "no output"

    def reach(self, step: int) -> None:
        self.wait(lambda: self.step >= step)

    def hosts(self) -> list[str]:
        names = self.cluster.call("squeue", "--noheader", f"--jobs={self.job}", "--format=%N")
        return self.cluster.call("scontrol", "show", "hostnames", names).split()

    def process(self, role: str) -> psutil.Process:
        """The process of a role, the oldest where it has forked."""
        kind, _, index = role.partition("-")
        module = "megadistill.trainer" if kind == "trainer" else "megadistill.rollout.vllm_server"
        found = []
        for process in psutil.process_iter(["cmdline", "create_time"]):
            words = process.info["cmdline"] or []
            if module not in words or str(self.run.path) not in words:
                continue
            with suppress(psutil.Error):
                if kind == "engine" or process.environ().get("RANK") == index:
                    found.append(process)
        assert found, f"{role} does not run: {self.tail()}"
        return min(found, key=lambda process: float(process.info["create_time"]))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Requeued and at rest meanwhile, so that its files can be touched."""
        self.cluster.call("scontrol", "requeuehold", self.job)
        self.wait(lambda: self.state() == "PENDING")
        wait_until(lambda: not self.roles(), self.tail, 60.0)
        yield
        self.cluster.call("scontrol", "release", self.job)

    def roles(self) -> list[int]:
        where = str(self.run.path)
        return [
            p.pid for p in psutil.process_iter(["cmdline"]) if where in (p.info["cmdline"] or [])
        ]

    def writing(self) -> Path | None:
        """The checkpoint that is being written."""
        newest = self.run.checkpoints()[:1]
        return newest[0] if newest and not is_whole(newest[0]) else None


def kill_role(role: str) -> Callable[[Disturbed], None]:
    def kill(run: Disturbed) -> None:
        run.process(role).kill()

    return kill


def kill_node(run: Disturbed) -> None:
    host = run.dice.choice(run.hosts())
    number = int(host.removeprefix("node"))
    run.cluster.power("kill", number)
    # Slurm would notice by itself after its SlurmdTimeout and more; an operator is faster.
    run.cluster.call("scontrol", "update", f"nodename={host}", "state=down", "reason=test")
    run.cluster.power("node", number)  # boots again


def time_limit(run: Disturbed) -> None:
    run.cluster.call("scancel", "--signal=USR1", run.job)


def requeue(run: Disturbed) -> None:
    run.cluster.call("scontrol", "requeue", run.job)


def preempt(run: Disturbed) -> None:
    """A job of the higher partition takes every node for some seconds."""
    other = run.cluster.call(
        *("sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive"),
        *("--output=/dev/null", "--wrap=sleep 2"),
    )
    run.cluster.wait_for_state(other, "COMPLETED", patience_s=PATIENCE_S)


def restart_controller(run: Disturbed) -> None:
    file = Path(run.cluster.environment["MEGADISTILL_SLURM"]) / "run" / "slurmctld"
    os.kill(int(file.read_text().split()[0]), signal.SIGKILL)
    time.sleep(1)
    run.cluster.call(str(LOCAL_CLUSTER), "start")


def kill_while_saving(run: Disturbed) -> None:
    trainer = run.process("trainer-0")
    deadline = time.monotonic() + PATIENCE_S
    while run.writing() is None:
        assert time.monotonic() < deadline, "no checkpoint was ever half written"
        time.sleep(0.002)
    trainer.kill()


def fill(stream: FileIO) -> None:
    for size in (1 << 20, 1 << 12, 1):
        with suppress(OSError):
            while stream.write(b"x" * size) == size:
                pass


def fill_disk(run: Disturbed) -> None:
    """No byte is left in the run directory until the attempt has ended by that."""
    ballast, attempts = run.run.path.parent / "ballast", run.attempts
    with ballast.open("wb", buffering=0) as stream:

        def ended() -> bool:
            fill(stream)  # again and again: old checkpoints are deleted
            return run.state() != "RUNNING" or run.attempts > attempts

        try:
            wait_until(ended, run.tail, PATIENCE_S)
        finally:
            ballast.unlink()
    assert os.strerror(errno.ENOSPC) in run.tail(), run.tail()
    wait_until(lambda: run.state() in ("RUNNING", "FAILED"), run.tail, PATIENCE_S)
    if run.state() == "FAILED":
        run.submit()


def hang_engine(run: Disturbed) -> None:
    run.process("engine-0").suspend()


def truncate_checkpoint(run: Disturbed) -> None:
    with run.held():
        _, newest = run.run.whole_checkpoints()[-1]
        file = max(newest.rglob("*.distcp"), key=lambda file: file.stat().st_size)
        os.truncate(file, file.stat().st_size // 2)


def corrupt_metrics(run: Disturbed) -> None:
    with run.held():
        lines = run.run.metrics_file.read_bytes().splitlines(keepends=True)
        number = run.dice.randrange(1, len(lines) - 1)
        row = read_metrics(run.run.metrics_file)[number]
        lines[number] = b'{"step": \xff\x00' + lines[number][:40] + b"\n"
        run.run.metrics_file.write_bytes(b"".join(lines))
        run.lost_lines.add(row["step"])


FAULTS: dict[str, Callable[[Disturbed], None]] = {
    "node lost": kill_node,
    "preempted": preempt,
    "controller killed": restart_controller,
    "killed while saving": kill_while_saving,
    "engine killed": kill_role("engine-0"),
    "disk full": fill_disk,
    "trainer 0 killed": kill_role("trainer-0"),
    "trainer 1 killed": kill_role("trainer-1"),
    "time limit": time_limit,
    "scontrol requeue": requeue,
    "engine hangs": hang_engine,
    "checkpoint truncated": truncate_checkpoint,
    "metrics line corrupted": corrupt_metrics,
}
"""Those that lead to the most different code come first: a short test takes only them."""


@dataclass(frozen=True)
class Outcome:
    """What a fault has cost."""

    fault: str
    step: int
    """Steps taken when it happened."""
    seconds: float
    """From the fault to a step that the run had not taken before."""
    attempts: int
    """Starts of the roles it took."""


def suffer(run: Disturbed, fault: str) -> Outcome:
    """Do it, and wait until the run has taken a step it had not taken before."""
    step, attempts, begun = run.step, run.attempts, time.monotonic()
    FAULTS[fault](run)
    if fault != "controller killed":  # which no run notices
        run.wait(lambda: run.attempts > attempts)
    step = max(step, run.step)  # it may have gone on until then
    run.reach(step + 1)
    seconds = time.monotonic() - begun
    return Outcome(fault=fault, step=step, seconds=seconds, attempts=run.attempts - attempts)


def let_finish(run: Disturbed) -> int:
    """Give the run its last step, a little ahead of where it stands; returns that."""
    run.cluster.call("scontrol", "requeuehold", run.job)
    run.wait(lambda: not run.roles())
    run.cluster.call("scancel", run.job)
    steps = run.step + 2
    run.submit(steps)
    run.wait(lambda: run.state() == "COMPLETED")
    return steps


def run_undisturbed(folder: Path, steps: int) -> RunDir:
    """The same run through `megadistill train`, with nobody in its way."""
    config = write_config(folder, "undisturbed", steps)
    finish(start(train_command(config)), timeout_s=3600)
    return RunDir(folder / "runs" / "undisturbed")


def write_config(folder: Path, name: str, steps: int, runs: str = "runs") -> Path:
    """A tiny run of two trainers and an engine on two nodes, which saves every step."""
    return write_run(
        folder,
        name,
        steps=steps,
        runs_dir=str(folder / runs),
        parallel={"dp": 2},
        evaluate={"every": 0},
        cluster={"nodes": 2, "cpus_per_node": 1, "max_attempts": 1000, "time_minutes": 60},
    )


def same_rows(run: Disturbed, expected: list[Row]) -> bool:
    """Whether every step is exactly the undisturbed one, none missing and none there twice."""
    return run.rows() == [row for row in expected if row[0] not in run.lost_lines]


def same_weights(one: RunDir, other: RunDir) -> bool:
    """Whether the exported students are equal to the last bit."""
    pairs = [sorted(run.export.glob("*.safetensors")) for run in (one, other)]
    assert pairs[0]
    assert [file.name for file in pairs[0]] == [file.name for file in pairs[1]]
    for first, second in zip(*pairs, strict=True):
        tensors, others = load_file(first), load_file(second)
        if tensors.keys() != others.keys():
            return False
        if any(tensors[name].tobytes() != others[name].tobytes() for name in tensors):
            return False
    return True


@contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """A file system of its own for the runs, so that it can be filled; False where we may not.

    Before the cluster starts: its nodes have the mounts of that moment.
    """
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "megadistill", str(directory)]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(directory)], check=False)


def submit_command(config: Path) -> list[str]:
    return [sys.executable, "-m", "megadistill", "submit", "train", str(config)]
