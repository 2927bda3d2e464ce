"""Stages that need each other: run, submitted, shown and cancelled in order.

A campaign is that, and so is a refinement or an evaluation, `StagedWork`, with a result at its end:

    RUN/stages/NAME/        a stage, see `launch/stages.py`
    RUN/stages/result/      the job that puts the result together, a shard like any other
    RUN/stages.json         what the stages consist of, for `megadistill status RUN`; also a campaign's

A shard's name depends on the names of those it reads, not on what they made. So all stages are
submitted at once, as dependent arrays, and nobody waits for them: a last, small job runs the same
command again, which finds all done and makes the result, or submits what has vanished and waits for
that without holding a node. In a shard, such as a campaign's stage, the command's own job does so.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from megadistill.atomic import write_atomic
from megadistill.config.cluster import ClusterConfig
from megadistill.launch.commands import command_shard
from megadistill.launch.gang import Gang
from megadistill.launch.node_context import ask_slurm
from megadistill.launch.processes import say
from megadistill.launch.shards import MAY_WAIT, OUTPUT, Shard, ShardFolder
from megadistill.launch.shared_files import read_as
from megadistill.launch.slurm import WAIT_POLL_S, SlurmSilentError, gone_if_refused, live_jobs
from megadistill.launch.stages import Limits, ShardedStage, StageRecord, StageState, read_jobs
from megadistill.launch.stopping import STOPPED

PLAN = "stages.json"
RESULT = "result"
STATUS_PATIENCE_S = 20.0


Stage = ShardedStage | Gang
"""Alike from here: each is submitted after others, run here, and shown."""


def submit_stages(stages: Sequence[Stage], *, afresh: bool = True) -> dict[str, list[str]]:
    """Submit what is neither done nor in the queue; the jobs of each stage that are to end.

    Not `afresh` it goes on with an earlier call, whose failures stand.
    """
    left = [stage for stage in stages if not stage.is_done]
    live = live_jobs() if left else {}
    jobs: dict[str, list[str]] = {}
    for stage in left:
        after = [job for need in stage.needs for job in jobs.get(need, ())]
        if found := stage.submit(live, after, afresh=afresh):
            jobs[stage.name] = found
            say(f"{stage.name}: job {', '.join(found)}")
    return jobs


def run_stages(stages: Sequence[Stage]) -> bool:
    """One after the other on this machine, without Slurm; whether all are done.

    A stage that fails keeps those from running that need it, and no others.
    """
    done: set[str] = set()
    for stage in stages:
        if missing := [need for need in stage.needs if need not in done]:
            say(f"{stage.name}: not run, it needs {', '.join(missing)}")
            continue
        if not stage.is_done:
            stage.run_here()
        if stage.is_done:
            done.add(stage.name)
            say(f"{stage.name}: done")
        else:
            say(f"{stage.name}: failed; {stage.describe()}")
    return len(done) == len(stages)


def cancel(folders: Sequence[Path]) -> list[str]:
    """Cancel what is in the queue for stages in these directories, last ones first.

    A job comes before those for which its shards wait, so that it does not start for their end.
    Returns the jobs' numbers.
    """
    jobs: dict[str, None] = {}
    for folder in reversed(folders):
        jobs |= dict.fromkeys(read_jobs(folder))
        for waits in folder.glob("shards/*/waits.json"):
            jobs |= dict.fromkeys(ShardFolder(waits.parent).waits()[0])
    live = live_jobs()
    found = [job for job in jobs if job in live]
    if found:
        ask_slurm(["scancel", *found])
    return found


def table(states: Sequence[StageState]) -> Group:
    """One row a stage, and below the last trouble of each, in full."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("stage", "verb", "state", "job", "progress"):
        shown.add_column(heading)
    for state in states:
        cells = (state.name, state.verb, state.status, state.job, state.progress)
        shown.add_row(*(Text(cell) for cell in cells))
    return Group(shown, *(Text(f"{one.name}: {one.detail}") for one in states if one.detail))


@dataclass(frozen=True, kw_only=True)
class StagedWork:
    """Stages, and where they run."""

    name: str
    root: Path
    command: Sequence[str]
    """The `megadistill` command line that goes on with it."""
    limits: Limits
    cluster: ClusterConfig | None
    """Absent: all runs on this machine."""
    is_new: bool = False
    """Whether its directory was made for this call."""
    stages: list[ShardedStage] = field(default_factory=list)
    """Each after those it needs."""

    def stage(
        self, name: str, shards: Sequence[Shard[Any]], needs: Sequence[str] = ()
    ) -> ShardedStage:
        """Add a stage, if there is anything to do in it."""
        made = self.made(name, shards, needs)
        if shards:
            self.stages.append(made)
        return made

    def made(
        self, name: str, shards: Sequence[Shard[Any]], needs: Sequence[str] = ()
    ) -> ShardedStage:
        return ShardedStage(
            name=name,
            root=self.root / "stages" / name,
            shards=shards,
            limits=self.limits,
            needs=needs,
            cluster=self.cluster or ClusterConfig(),
            job_name=f"{self.name}-{name}",
        )

    def carry_out(self, finish: Callable[[], str], *, wait: bool = False) -> str:
        """Run or submit what is not done; returns what to say of it.

        `finish` makes the result and returns what to say of that; it raises `ValueError` for stages
        that are not done. `wait` stays until then, also where jobs do the work.
        """
        output = os.environ.get(OUTPUT)
        own = None
        if output and os.environ.get(MAY_WAIT) and not wait:
            own = ShardFolder(Path(output).parent)
        makes_result = own is not None and own in self.result.folders.values()
        write_plan(self.root, [*self.stages, self.result] if makes_result else self.stages)
        rounds = own.waits()[1] if own else 0
        if not rounds:
            for stage in self.stages:
                stage.reopen()
        if self.cluster is None:
            run_stages(self.stages)
            return finish()
        while rounds < self.limits.tries and (jobs := self.submit(afresh=not rounds)):
            rounds += 1
            if own is not None:
                own.wait_for(jobs)
                sys.exit(STOPPED)
            if not wait and not output:
                return self.submit_result(jobs)
            say(f"waits for job {', '.join(jobs)}")
            while set(jobs) & live_jobs().keys():
                time.sleep(WAIT_POLL_S)
        return finish()

    def submit(self, *, afresh: bool) -> list[str]:
        """The jobs that are to end; none: nothing is left that can be done."""
        if not afresh and any(
            s.status == "failed" for stage in self.stages for s in stage.states()
        ):
            return []
        with gone_if_refused(self.root, is_new=self.is_new):
            jobs = submit_stages(self.stages, afresh=afresh)
        return [job for some in jobs.values() for job in some]

    @cached_property
    def result(self) -> ShardedStage:
        """The small job that makes the result: this command once more."""
        shard = replace(command_shard(self.command, label=RESULT), gpus=0)
        made = self.made(RESULT, [shard])
        asked = {"exclusive": False, "cpus_per_node": min(2, made.cluster.cpus_per_node or 2)}
        return replace(made, cluster=made.cluster.model_copy(update=asked))

    def submit_result(self, jobs: Sequence[str]) -> str:
        """Submit the job that makes the result, once these have ended."""
        write_plan(self.root, [*self.stages, self.result])
        (folder,) = self.result.folders.values()
        folder.done_file.unlink(missing_ok=True)
        (job,) = self.result.submit(live_jobs(), jobs, how="afterany")
        if not folder.waits()[0]:  # else it is one of an earlier call
            folder.wait_for(jobs)
        return f"{RESULT}: job {job}\nfollow it with: megadistill status {self.root}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What there is to do in a directory."""

    directory: Path
    """Where the command ran."""
    stages: tuple[StageRecord, ...]


def write_plan(root: Path, stages: Sequence[Stage]) -> None:
    """Keep what there is to do, for those who only look at it."""
    plan = Plan(directory=Path.cwd(), stages=tuple(stage.record for stage in stages))
    write_atomic(root / PLAN, json.dumps(asdict(plan), default=str))


def read_plan(root: Path) -> Plan:
    """What there is to do. Raises `ValueError` when the directory says nothing of it."""
    try:
        plan = read_as(Plan, root / PLAN)
    except ValueError:
        raise ValueError(
            f"{root / PLAN}: found no stages in it, expected what a campaign, a refinement or an "
            "evaluation writes, whose command, run again, writes it anew"
        ) from None
    if plan is None:
        raise ValueError(
            f"{root}: found no {PLAN}, expected the directory of a campaign, a refinement or an "
            "evaluation; one of an older version gets it when its command is run again"
        )
    return plan


def show(root: Path, console: Console) -> None:
    """The state of every stage, also when Slurm does not answer."""
    try:
        console.print(table(read_states(root)))
    except SlurmSilentError as error:
        console.print(table([stage.state(None) for stage in read_plan(root).stages]))
        console.print(Text(f"by the files alone, without the queue: {error}"), soft_wrap=True)


def read_states(root: Path) -> list[StageState]:
    """The state of every stage; Slurm is asked only when there are jobs to ask about, and briefly."""
    stages = read_plan(root).stages
    asked = any(read_jobs(stage.root) for stage in stages)
    live = live_jobs(STATUS_PATIENCE_S) if asked else {}
    return [stage.state(live) for stage in stages]
