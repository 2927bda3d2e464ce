"""Fan-outs: many independent shards at once, as a Slurm array or as processes of this machine.

    from megadistill.launch.fanout import Limits, Shard, run_fanout

    def rewrite(directory: Path, arguments: Mapping[str, Any]) -> None:    # in megadistill/refine/...
        ...                             # goes on from what it finds in `directory`, writes there

    shards = [
        Shard(entry="megadistill.refine.rewriting:rewrite", arguments={"part": i, "of": 8})
        for i in range(8)
    ]
    result = run_fanout(Path("runs/refine/rewrite"), shards, Limits(concurrency=4), cluster=None)
    result.check()                      # ValueError naming the failed shards and their last lines
    files = [directory / "rows.jsonl" for directory in result.directories]

With `cluster=None` the shards run here, `concurrency` at a time; with a `ClusterConfig` they are an
array of one-node jobs with as many at a time. Called again it runs only what is not done. Whether a
shard is done is judged by its own files, whether its job lives by squeue; accounting is not needed.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megadistill.atomic import write_atomic
from megadistill.config.cluster import ClusterConfig
from megadistill.launch.heartbeats import read_json
from megadistill.launch.node import DONE, STOPPED, stop_requests
from megadistill.launch.node_context import own_job, requeue
from megadistill.launch.shards import Shard, ShardFolder, ShardState, Worker, command_shard, say
from megadistill.launch.slurm import batch_executor, job_environment, live_jobs, make_sacct_usable

__all__ = [
    "FanoutResult",
    "Limits",
    "Shard",
    "command_shard",
    "run_fanout",
    "submit_fanout",
]

WAIT_POLL_S = 5.0
MOST_TASKS = 1000
"""Tasks of one array; Slurm's MaxArraySize is 1001 unless a site changed it. More shards share."""
MOST_RESTARTS = 20
"""Requeues of one task after which it gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a fan-out."""

    concurrency: int = 4
    """Shards that run at the same time."""
    tries: int = 3
    """How often a failing shard is run before it is given up."""
    gpus: int = 0
    """GPUs of one shard, where they share this machine; under Slurm `cluster.gpus_per_node` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutResult:
    """What became of the shards, in the order in which they were given."""

    shards: tuple[ShardState, ...]

    @property
    def directories(self) -> list[Path]:
        return [shard.directory for shard in self.shards]

    @property
    def failed(self) -> list[ShardState]:
        return [shard for shard in self.shards if shard.status != "done"]

    def describe(self) -> str:
        """One line a shard that is not done, and a total."""
        lines = [f"{shard.name}: {shard.status}. {shard.detail}".rstrip() for shard in self.failed]
        done = len(self.shards) - len(lines)
        return "\n".join([*lines, f"{done} of {len(self.shards)} shards are done"])

    def check(self) -> None:
        """Raise `ValueError` unless every shard is done."""
        if self.failed:
            raise ValueError(self.describe())


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsTask:
    """What a task of the array calls; submitit pickles it."""

    folders: tuple[ShardFolder, ...]
    tries: int

    def __call__(self) -> int:
        """Work the task's shards off. On Slurm's warning the task is requeued and goes on later."""
        with stop_requests() as stop:
            worker = Worker(slots=1, tries=self.tries, stopped=lambda: stop.reason is not None)
            worker.work(self.folders)
            if stop.reason is not None:
                leave_to_resume(stop.reason)
        failed = [folder.path.name for folder in self.folders if not folder.done_file.exists()]
        if failed:
            raise RuntimeError(f"shards failed {self.tries} times: {', '.join(failed)}")
        return DONE


def leave_to_resume(reason: str) -> None:
    """End this task without a result, for which submitit would take it for finished."""
    problem: str | None = f"it was requeued {MOST_RESTARTS} times"
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < MOST_RESTARTS:
        problem = requeue(own_job(os.environ))
    say(f"asked to stop ({reason}); " + (f"not requeued: {problem}" if problem else "requeued"))
    sys.stdout.flush()
    os._exit(STOPPED)


def run_fanout(
    root: Path,
    shards: Sequence[Shard],
    limits: Limits | None = None,
    *,
    cluster: ClusterConfig | None,
    name: str = "fanout",
) -> FanoutResult:
    """Run what is not done of `shards`, and return when nothing more can be done.

    A shard that fails `limits.tries` times does not keep the others from running; `check()` of the
    result raises for it. Jobs of an earlier call that still run are waited for, not repeated; jobs
    that vanish (a lost node without requeue, a cluster whose state was wiped) are submitted again.
    """
    limits = limits or Limits()
    if cluster is None:
        worker = Worker(slots=limits.concurrency, tries=limits.tries, gpus=limits.gpus)
        worker.work(prepare(root, shards))
        return collect(root, shards, limits)
    wait_for_jobs(root)
    folders = prepare(root, shards)
    for _ in range(limits.tries):
        left = [folder for folder in folders if folder.has_work(limits.tries)]
        if not left:
            break
        submit_array(root, left, limits, cluster=cluster, name=name)
        wait_for_jobs(root)
    return collect(root, shards, limits)


def submit_fanout(
    root: Path,
    shards: Sequence[Shard],
    limits: Limits | None = None,
    *,
    cluster: ClusterConfig,
    name: str = "fanout",
    after: Sequence[str] = (),
) -> str | None:
    """Submit what is not done as an array, and return its job number; None when all is done.

    `after` are jobs that must end well first. Raises `ValueError` when an earlier array of these
    shards is still in the queue.
    """
    limits = limits or Limits()
    root = root.absolute()
    if alive := [job for job in read_jobs(root) if job in live_jobs()]:
        raise ValueError(
            f"{root}: found job {', '.join(alive)} of this fan-out in the queue, expected none; "
            "wait for it, or scancel it"
        )
    folders = prepare(root, shards)
    if not folders:
        return None
    return submit_array(root, folders, limits, cluster=cluster, name=name, after=after)


def submit_array(
    root: Path,
    folders: Sequence[ShardFolder],
    limits: Limits,
    *,
    cluster: ClusterConfig,
    name: str,
    after: Sequence[str] = (),
) -> str:
    """Submit these shards, prepared before, and return the job's number."""
    num_tasks = min(len(folders), MOST_TASKS)
    tasks = [
        ShardsTask(folders=tuple(folders[first::num_tasks]), tries=limits.tries)
        for first in range(num_tasks)
    ]
    one_node = cluster.model_copy(update={"nodes": 1, "rollout_nodes": 0})
    executor = batch_executor(name, one_node, root, after=after)
    executor.update_parameters(array_parallelism=limits.concurrency)
    make_sacct_usable()
    with job_environment():
        job: str = executor.map_array(run_task, tasks)[0].job_id.split("_")[0]
    add_job(root, job)
    return job


def run_task(task: ShardsTask) -> int:
    """The function of the array."""
    return task()


def prepare(root: Path, shards: Sequence[Shard]) -> list[ShardFolder]:
    """Make the directories of what is not done, each once, and return those."""
    folders = {}
    for shard in shards:
        folder = ShardFolder.of(root.absolute(), shard)
        if not folder.done_file.exists():
            folder.create(shard)
            folders[shard.key] = folder
    return list(folders.values())


def collect(root: Path, shards: Sequence[Shard], limits: Limits) -> FanoutResult:
    """How the shards stand, by their files."""
    states = [
        ShardFolder.of(root.absolute(), shard).state(shard.name, limits.tries) for shard in shards
    ]
    return FanoutResult(shards=tuple(states))


def read_jobs(root: Path) -> list[str]:
    """Slurm's numbers of the arrays submitted for the fan-out in `root`, oldest first."""
    values = read_json(root / "jobs.json")
    jobs: list[str] = values["jobs"] if values else []
    return jobs


def add_job(root: Path, job: str) -> None:
    """Note a job that was submitted for what lies in `root`."""
    write_atomic(root / "jobs.json", json.dumps({"jobs": [*read_jobs(root), job]}))


def wait_for_jobs(root: Path) -> None:
    """Until no job of this fan-out is in the queue."""
    jobs = set(read_jobs(root))
    while jobs & live_jobs().keys():
        time.sleep(WAIT_POLL_S)
