"""A stage: many independent shards at once, as Slurm arrays or as processes of this machine.

    class RewriteArguments(ShardArguments):
        part: int
        of: int

    def rewrite(directory: Path, arguments: RewriteArguments) -> None:
        ...                             # goes on from what it finds in `directory`, writes there

    stage = ShardedStage(
        name="rewrite",
        root=Path("runs/refine/stages/rewrite"),
        shards=[Shard(function=rewrite, arguments=RewriteArguments(part=i, of=8)) for i in range(8)],
        limits=Limits(concurrency=4),
    )
    stage.run_here()                    # or stage.submit(live_jobs())
    stage.check()                       # ValueError naming the failed shards and their last lines
    files = [directory / "rows.jsonl" for directory in stage.outputs]

Run or submitted again it does only what is not done. Whether a shard is done is judged by its own
files, whether its job lives by squeue; accounting is not needed.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megadistill.atomic import write_atomic
from megadistill.config.cluster import ClusterConfig
from megadistill.launch.attempts import last_error, read_attempts
from megadistill.launch.node_context import own_job, requeue
from megadistill.launch.processes import say
from megadistill.launch.shards import (
    EARLIER,
    FAILED,
    Shard,
    ShardFolder,
    ShardState,
    Upstream,
    Worker,
)
from megadistill.launch.shared_files import read_json
from megadistill.launch.slurm import JOBS, GangExecutor, array_room, batch_executor, submission
from megadistill.launch.stopping import DONE, STOPPED, stop_requests
from megadistill.rundir import RunDir

BEGUN = "submitted.json"
"""Says for what a stage's run was begun."""
MOST_RESTARTS = 20
"""Requeues of one task after which it gives up."""
Status = Literal["done", "running", "queued", "submitted", "failed", "stopped", "not submitted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a stage."""

    concurrency: int = 4
    """Shards that run at the same time."""
    tries: int = 3
    """How often a failing shard is run before it is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState:
    """A line of `megadistill campaign status`."""

    name: str
    verb: str = ""
    status: Status
    job: str = ""
    """Slurm's number of the last job."""
    progress: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """What a stage consists of, for those who only look at it: shards, or one run."""

    name: str
    root: Path
    verb: str = ""
    tries: int = 1
    keys: tuple[str, ...] = ()
    """Of the shards."""
    run: Path | None = None
    digest: str = ""
    """Identifies the run and all that it depends on."""
    steps: int = 0

    def shards(self) -> list[ShardState]:
        """How the shards stand, by their files."""
        folders = [ShardFolder(self.root / "shards" / key) for key in self.keys]
        return [folder.state(self.tries) for folder in folders]

    def state(self, live: Mapping[str, str] | None) -> StageState:
        """Its line of the table, by its files and the jobs in the queue; None: nobody knows."""
        jobs = list(read_jobs(self.root))
        if self.run is not None:
            status, progress, detail = self._of_run(RunDir(self.run))
        else:
            status, progress, detail = self._of_shards()
        return StageState(
            name=self.name,
            verb=self.verb,
            status=status_of(status, jobs, live),
            job=jobs[-1] if jobs else "",
            progress=progress,
            detail=detail,
        )

    def _of_run(self, run: RunDir) -> tuple[Status, str, str]:
        progress = run.read_progress()
        done = f"step {progress.get('step', 0)} of {self.steps}"
        begun = read_json(self.root / BEGUN)
        if progress.get("done") and begun in (None, {"digest": self.digest}):
            return "done", done, ""
        attempts = read_attempts(run)
        failed = bool(attempts) and attempts[-1].status == "failed"
        return "failed" if failed else "not submitted", done, last_error(run) or ""

    def _of_shards(self) -> tuple[Status, str, str]:
        shards = self.shards()
        done = [shard for shard in shards if shard.status == "done"]
        failed = [shard for shard in shards if shard.status == "failed"]
        running = [shard for shard in shards if shard.is_running]
        parts = [f"{len(done)} of {len(shards)}"]
        parts += [f"{len(failed)} failed"] if failed else []
        parts += [f"{len(running)} running"] if running else []
        if running and done:
            left = (len(shards) - len(done) - len(failed)) / len(running)
            seconds = sum(shard.seconds for shard in done) / len(done) * left
            parts.append(f"ETA {timedelta(seconds=round(seconds))}")
        status: Status = "failed" if failed else "not submitted"
        if running:
            status = "running"  # also here, without a job
        if len(done) == len(shards):
            status = "done"
        detail = f"{failed[0].name}: {failed[0].detail}" if failed else ""
        return status, ", ".join(parts), detail


@dataclass(frozen=True, kw_only=True)
class ShardedStage:
    """The shards of one stage and the directory in which they lie."""

    name: str
    root: Path
    shards: Sequence[Shard[Any]]
    limits: Limits = field(default_factory=Limits)
    needs: Sequence[str] = ()
    """Names of the stages that must be done before."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """What a job of its shards asks for, but for GPUs, where a shard says how many it uses."""
    job_name: str = "stage"
    verb: str = ""

    @cached_property
    def folders(self) -> dict[str, ShardFolder]:
        """Key -> directory of each shard, in order; the same work twice is one."""
        return {s.key: ShardFolder(self.root.absolute() / "shards" / s.key) for s in self.shards}

    @property
    def outputs(self) -> list[Path]:
        """Where each shard's output lies, in the order of the shards."""
        return self.upstream(self.shards).outputs

    def upstream(self, shards: Iterable[Shard[Any]]) -> Upstream:
        """Some of its shards, for those that read them."""
        return Upstream(root=self.root.absolute(), keys=tuple(shard.key for shard in shards))

    def states(self) -> list[ShardState]:
        """How the shards stand, by their files."""
        return self.record.shards()

    def describe(self) -> str:
        """One line a shard that is not done, and a total."""
        states = self.states()
        left = [f"{s.name}: {s.status}. {s.detail}".rstrip() for s in states if s.status != "done"]
        return "\n".join([*left, f"{len(states) - len(left)} of {len(states)} shards are done"])

    @property
    def record(self) -> StageRecord:
        return StageRecord(
            name=self.name,
            root=self.root.absolute(),
            verb=self.verb,
            tries=self.limits.tries,
            keys=tuple(self.folders),
        )

    @property
    def is_done(self) -> bool:
        return all(folder.done_file.exists() for folder in self.folders.values())

    def check(self) -> None:
        """Raise `ValueError` unless every shard is done."""
        if not self.is_done:
            raise ValueError(self.describe())

    def reopen(self) -> None:
        """Have the shards run again of which some part has failed, for that part."""
        for folder in self.folders.values():
            if (folder.output / FAILED).exists():
                folder.done_file.unlink(missing_ok=True)

    def prepare(
        self, *, afresh: bool, apart_from: Sequence[str] = ()
    ) -> dict[int | None, list[ShardFolder]]:
        """Make the directories of what is not done, and return those with work, by GPUs of a shard."""
        found: dict[int | None, list[ShardFolder]] = defaultdict(list)
        if earlier := {f.name for f in self.root.glob("shards/*")} - self.folders.keys():
            write_atomic(self.root / EARLIER, json.dumps(sorted(earlier)), sync=False)
        shards = {shard.key: shard for shard in self.shards}
        for key, folder in self.folders.items():
            if key in apart_from or folder.done_file.exists():
                continue
            folder.create(shards[key], afresh=afresh)
            if folder.has_work(self.limits.tries):
                found[shards[key].gpus].append(folder)
        return found

    def run_here(self) -> None:
        """Run what is not done on this machine, until nothing more can be done; see `check`.

        A shard that fails `limits.tries` times does not keep the others from running.
        """
        done = sum(folder.done_file.exists() for folder in self.folders.values())
        say(f"{self.name}: {done} of {len(self.folders)} shards done before")
        for gpus, folders in self.prepare(afresh=True).items():
            slots, tries = self.limits.concurrency, self.limits.tries
            worker = Worker(slots=slots, tries=tries, gpus=gpus or 0)
            worker.work(folders)

    def submit(
        self,
        live: Mapping[str, str],
        after: Sequence[str] = (),
        *,
        how: str = "afterok",
        afresh: bool = True,
    ) -> list[str]:
        """Submit what is neither done nor under way in `live` jobs, as an array for each need of GPUs.

        Returns the jobs after which the stage has ended, those of earlier calls among them; empty:
        nothing is left to do. `after` are jobs that must end first, `how` in Slurm's words; so must
        those under way in this directory. Not `afresh`, shards whose tries have failed are left alone.
        """
        under_way = {job: keys for job, keys in read_jobs(self.root).items() if job in live}
        jobs = [job for job, keys in under_way.items() if self.folders.keys() & set(keys)]
        busy = [key for keys in under_way.values() for key in keys]
        conditions = [(how, after), ("afterany", under_way)]
        dependency = ",".join(f"{kind}:{':'.join(some)}" for kind, some in conditions if some)
        for gpus, folders in self.prepare(afresh=afresh, apart_from=busy).items():
            # A shard asks for the GPUs it uses, not for all of a node.
            asked = {"nodes": 1, "rollout_nodes": 0}
            asked |= {} if gpus is None else {"gpus_per_node": gpus}
            one_node = self.cluster.model_copy(update=asked)
            executor = batch_executor(self.job_name, one_node, self.root.absolute(), dependency)
            jobs.append(submit_array(executor, self.root, folders, self.limits))
        return jobs


def status_of(found: Status, jobs: Sequence[str], live: Mapping[str, str] | None) -> Status:
    """What to say of something of which its files say this, and for which these jobs were submitted."""
    if found in ("done", "running"):
        return found
    if live is None:
        return "submitted" if jobs else found
    if alive := {live[job] for job in jobs if job in live}:
        return "running" if "RUNNING" in alive else "queued"
    return "stopped" if found == "not submitted" and jobs else found


def work_off(folders: Sequence[ShardFolder], tries: int) -> int:
    """A task of the array: work its shards off.

    On Slurm's warning, or when shards wait for other jobs, it is requeued and goes on later.
    """
    with stop_requests() as stop:
        Worker(slots=1, tries=tries, may_wait=True, stop=stop).work(folders)
        if stop.reason is not None:
            leave_to_resume(f"asked to stop ({stop.reason})")
        left = [folder for folder in folders if folder.has_work(tries)]
        if waits := [job for folder in left for job in folder.waits()[0]]:
            leave_to_resume("waits for other jobs", behind=waits)
    failed = [folder.path.name for folder in folders if not folder.done_file.exists()]
    if failed:
        raise RuntimeError(f"shards failed {tries} times: {', '.join(failed)}")
    return DONE


def leave_to_resume(reason: str, behind: Sequence[str] = ()) -> None:
    """End this task without a result, for which submitit would take it for finished."""
    problem: str | None = f"it was requeued {MOST_RESTARTS} times"
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < MOST_RESTARTS:
        problem = requeue(own_job(os.environ), behind)
    say(f"{reason}; " + (f"not requeued: {problem}" if problem else "requeued"))
    sys.stdout.flush()
    os._exit(STOPPED)


def submit_array(
    executor: GangExecutor, root: Path, folders: Sequence[ShardFolder], limits: Limits
) -> str:
    """Submit these shards, prepared before, and return the job's number."""
    num_tasks = min(len(folders), array_room())
    shares = [folders[first::num_tasks] for first in range(num_tasks)]
    executor.update_parameters(array_parallelism=limits.concurrency)
    with submission():
        jobs = executor.map_array(work_off, shares, [limits.tries] * num_tasks)
    job: str = jobs[0].job_id.split("_")[0]
    add_job(root, job, [folder.path.name for folder in folders])
    return job


def read_jobs(root: Path) -> dict[str, list[str]]:
    """Slurm's numbers of the jobs submitted for what lies in `root`, oldest first, and their shards."""
    values = read_json(root / JOBS) or {}
    jobs: dict[str, list[str]] = values.get("shards", {})  # 0.1 had no such table
    return jobs


def add_job(root: Path, job: str, keys: Sequence[str] = ()) -> None:
    """Note a job that was submitted for what lies in `root`, and the shards it works on."""
    write_atomic(root / JOBS, json.dumps({"shards": {**read_jobs(root), job: list(keys)}}))
