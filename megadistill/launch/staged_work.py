"""A refinement or an evaluation: sharded stages, some of which need others, and a result at the end.

    RUN/stages/NAME/        a stage, see `launch/stages.py`
    RUN/stages/result/      the job that puts the result together, a shard like any other
    RUN/stages.json         what the stages consist of, for `megadistill status RUN`

A shard's name depends on the names of those it reads, not on what they made. So all stages are
submitted at once, as dependent arrays, and nobody waits for them: a last, small job runs the same
command again, which finds all done and makes the result, or submits what has vanished and waits for
that without holding a node. In a shard, such as a campaign's stage, the command's own job does so.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megadistill.atomic import write_atomic
from megadistill.config.cluster import ClusterConfig
from megadistill.launch.commands import command_shard
from megadistill.launch.shards import MAY_WAIT, OUTPUT, ShardFolder, say
from megadistill.launch.slurm import WAIT_POLL_S, live_jobs
from megadistill.launch.stages import Limits, ShardedStage, StageState, jobs_in_queue, state_of
from megadistill.launch.stopping import STOPPED

PLAN = "stages.json"
RESULT = "result"


@dataclass(frozen=True, kw_only=True)
class StagedWork:
    """Stages, where they run, and what makes a result of them."""

    name: str
    root: Path
    command: Sequence[str]
    """The `megadistill` command line that goes on with it."""
    stages: Sequence[ShardedStage]
    """Each after those it needs."""
    limits: Limits
    cluster: ClusterConfig | None
    """Absent: all runs on this machine."""
    finish: Callable[[], str]
    """Makes the result and returns what to say of it; raises for stages that are not done."""

    def carry_out(self, *, wait: bool = False) -> str:
        """Run or submit what is not done; returns what to say of it.

        `wait` stays until the result is there, also where jobs do the work.
        """
        plan = {s.name: {shard.key: shard.name for shard in s.shards} for s in self.stages}
        if self.cluster is not None:
            plan[RESULT] = {shard.key: shard.name for shard in self.result.shards}
        values = {"tries": self.limits.tries, "stages": plan}
        write_atomic(self.root / PLAN, json.dumps(values))
        if self.cluster is None:
            return self.run_here()
        output = os.environ.get(OUTPUT)
        if output and os.environ.get(MAY_WAIT) and not wait:
            return self.run_as_shard(self.cluster, ShardFolder(Path(output).parent))
        if wait or output:
            return self.run_and_wait(self.cluster)
        return self.submit(self.cluster)

    def run_here(self) -> str:
        """One stage after the other on this machine."""
        for stage in self.stages:
            done = sum(state.status == "done" for state in stage.states())
            say(f"{stage.name}: {len(stage.folders)} shards, {done} of them done before")
            stage.run_here()
            if not stage.is_done:
                break
        return self.finish()

    def submit_stages(self, cluster: ClusterConfig, *, afresh: bool) -> dict[str, list[str]]:
        """The jobs of each stage that are still to end; none: nothing is left that can be done.

        Not `afresh` it is a call that goes on with an earlier one, whose failures stand.
        """
        states = [state.status for stage in self.stages for state in stage.states()]
        if set(states) == {"done"} or (not afresh and "failed" in states):
            return {}
        live = live_jobs()
        jobs: dict[str, list[str]] = {}
        for stage in self.stages:
            after = [job for need in stage.needs for job in jobs.get(need, ())]
            name = f"{self.name}-{stage.name}"
            found = stage.submit(cluster, name, live=live, after=after, afresh=afresh)
            jobs |= {stage.name: found} if found else {}
        return jobs

    def submit(self, cluster: ClusterConfig) -> str:
        """All stages at once, and the small job that makes the result of them."""
        jobs = self.submit_stages(cluster, afresh=True)
        if not jobs:
            return self.finish()
        asked = {"exclusive": False, "cpus_per_node": min(2, cluster.cpus_per_node or 2)}
        small = cluster.model_copy(update=asked)
        (folder,) = self.result.folders.values()
        folder.done_file.unlink(missing_ok=True)
        jobs[RESULT] = self.result.submit(
            small, f"{self.name}-{RESULT}", live=live_jobs(), after=all_of(jobs), how="afterany"
        )
        folder.wait_for(all_of(jobs))
        lines = [f"{name}: job {', '.join(some)}" for name, some in jobs.items()]
        return "\n".join([*lines, f"follow it with: megadistill status {self.root}"])

    @property
    def result(self) -> ShardedStage:
        """The stage of the job that makes the result: this command, once more."""
        return ShardedStage(
            name=RESULT,
            root=self.root / "stages" / RESULT,
            shards=[replace(command_shard(self.command, label=RESULT), gpus=0)],
            limits=replace(self.limits, tries=1),
        )

    def run_as_shard(self, cluster: ClusterConfig, own: ShardFolder) -> str:
        """Make the result, or end this process to be run again once what is left has ended."""
        _, rounds = own.waits()
        jobs = self.submit_stages(cluster, afresh=not rounds)
        if not jobs:
            return self.finish()
        if rounds > self.limits.tries:
            raise ValueError(
                f"{self.root}: found shards that are not done after {rounds} submissions, "
                "expected them done or failed; see its jobs in stages/*/jobs"
            )
        own.wait_for(all_of(jobs))
        sys.exit(STOPPED)

    def run_and_wait(self, cluster: ClusterConfig) -> str:
        """Submit, and stay until nothing more can be done. Jobs that vanish are submitted again."""
        for number in range(self.limits.tries):
            jobs = set(all_of(self.submit_stages(cluster, afresh=number == 0)))
            if not jobs:
                break
            say(f"waits for job {', '.join(sorted(jobs))}")
            while jobs & live_jobs().keys():
                time.sleep(WAIT_POLL_S)
        return self.finish()


def all_of(jobs: Mapping[str, Sequence[str]]) -> list[str]:
    """The jobs of all stages."""
    return [job for some in jobs.values() for job in some]


def is_staged_work(root: Path) -> bool:
    """Whether a directory holds a refinement or an evaluation."""
    return (root / PLAN).exists()


def stage_folders(root: Path) -> list[Path]:
    """The directories of the stages, in order."""
    return [root / "stages" / name for name in json.loads((root / PLAN).read_text())["stages"]]


def read_states(root: Path) -> list[StageState]:
    """The state of every stage."""
    plan = json.loads((root / PLAN).read_text())
    live = jobs_in_queue(stage_folders(root))
    found = []
    for folder, shards in zip(stage_folders(root), plan["stages"].values(), strict=True):
        folders = {ShardFolder(folder / "shards" / key): name for key, name in shards.items()}
        states = [shard.state(name, plan["tries"]) for shard, name in folders.items()]
        found.append(state_of(folder, folder.name, states, live))
    return found
