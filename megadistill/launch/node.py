"""The process of a node: starts the node's roles, watches them, and ends together with the others.

Node 0 begins the attempt, collects what the other nodes say, and alone decides the outcome: done,
stopped (asked to save and end; under Slurm it requeues the job), or failed with a culprit. The
others take it. Whoever falls silent is given up after a bounded time, so nothing hangs.
"""

import errno
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megadistill.atomic import write_atomic
from megadistill.config import RunConfig, load
from megadistill.launch.allowed_paths import check_run_roots
from megadistill.launch.attempt_log import close_attempts, note_failure
from megadistill.launch.heartbeats import (
    AttemptOutcome,
    Failure,
    Heartbeats,
    attempt_directory,
    await_launch,
    launch_file,
    sole_owner,
)
from megadistill.launch.layout import Layout, NodePlan, describe, layout
from megadistill.launch.node_context import (
    NodeContext,
    local_context,
    rendezvous_port,
    requeue,
    slurm_context,
)
from megadistill.launch.on_export import ExportWatch, export_watch
from megadistill.launch.processes import Exit, LogFollower, Processes, show
from megadistill.launch.roles import Launch, RoleCommand, role_command, role_environment
from megadistill.launch.stopping import DONE, FAILED, STOPPED, StopRequest, stop_requests
from megadistill.launch.supervisor import Follower, Leader, Supervisor, Timeouts
from megadistill.rundir import RunDir

EXPORTS_WAIT_S = 60.0
"""For the evaluation of the last exports to be submitted, not for itself."""


def run_node(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    context: NodeContext,
    command: RoleCommand = role_command,
    timeouts: Timeouts | None = None,
) -> int:
    """Run this node's part of a training run to its end.

    `source` is a configuration file or a run directory, `command` builds the roles' command
    lines. Returns 0 when the run is done, 75 when it was stopped and can be resumed (under Slurm it has
    then been requeued), 1 when a role failed. Raises `ValueError` for a configuration that cannot
    run here. Only from the main thread, since it handles signals.
    """
    timeouts = timeouts or Timeouts()
    config, run = open_run(source, overrides)
    if run.has_done(config):
        return answer_done(run, context)
    plan = layout(
        config, context.num_nodes, gpus_per_node(config), second_component=context.second_component
    )
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        if context.node == 0:
            check_restarts(config, context)
            stack.enter_context(sole_owner(run, timeouts.lock_s))
            run.create(config)
            launch = begin_launch(run, context, plan)
        else:
            launch = await_launch(run, context, timeouts.start_s)
        node = Node(
            run=run,
            config=config,
            plan=plan,
            context=context,
            launch=launch,
            timeouts=timeouts,
            stop=stop,
        )
        return node.work(command)


def begin_launch(run: RunDir, context: NodeContext, plan: Layout) -> Launch:
    """Node 0: begin an attempt and tell the other nodes."""
    attempt = run.begin_attempt()
    close_attempts(run, attempt)
    attempt_directory(run, attempt).mkdir(mode=0o700)
    launch = Launch(
        launch_id=context.launch_id,
        attempt=attempt,
        master_port=rendezvous_port(context, attempt),
        hosts=context.hosts,
        roles=tuple(node.describe() for node in plan.nodes),
    )
    write_atomic(launch_file(run), json.dumps(asdict(launch)))
    return launch


def answer_done(run: RunDir, context: NodeContext) -> int:
    """Say that the run is done; see that the work on its exports is submitted."""
    if context.node == 0:
        export_watch(run).finish(EXPORTS_WAIT_S)
        progress = run.read_progress()
        show(f"[node 0] {run.path}: done, step {progress['step']} of {progress['steps']}\n")
    return DONE


def run_here(source: str | Path, overrides: Sequence[str] = ()) -> int:
    """`megadistill train`: every role on this machine, without Slurm."""
    return run_node(source, overrides, context=local_context())


def run_under_slurm(source: str | Path, overrides: Sequence[str] = ()) -> int:
    """`megadistill node`: this node's part, its place taken from the variables of `srun`."""
    return run_node(source, overrides, context=slurm_context())


def open_run(source: str | Path, overrides: Sequence[str]) -> tuple[RunConfig, RunDir]:
    """The configuration and the run directory named by a YAML file or by that directory."""
    path = Path(source)
    if path.is_dir():
        run = RunDir(path.absolute())
        config = load(RunConfig, run.config_file, overrides)
    else:
        config = load(RunConfig, path, overrides)
        run = RunDir.of(config)
    check_run_roots(config)
    return config, run


def gpus_per_node(config: RunConfig) -> int:
    """GPUs the layout may use on a node: those of the configuration, none on a CPU run."""
    return 0 if config.device == "cpu" else config.cluster.gpus_per_node


def check_restarts(config: RunConfig, context: NodeContext) -> None:
    """Slurm requeues a job by itself when a node fails; that too has a bound."""
    if context.restarts > config.cluster.max_attempts:
        raise ValueError(
            f"cluster.max_attempts: found restart {context.restarts} of job {context.job_id}, expected "
            f"at most {config.cluster.max_attempts}; submit the run again to go on"
        )


@dataclass(slots=True, kw_only=True)
class Node:
    """One node during one attempt."""

    run: RunDir
    config: RunConfig
    plan: Layout
    context: NodeContext
    launch: Launch
    timeouts: Timeouts
    stop: StopRequest
    heartbeats: Heartbeats = field(init=False)
    processes: Processes = field(default_factory=Processes)
    follower: LogFollower | None = None
    """Copies rank 0's log to the job's output."""
    exports: ExportWatch | None = None
    """On node 0: starts the evaluation of what the run exports."""

    def __post_init__(self) -> None:
        directory = attempt_directory(self.run, self.launch.attempt)
        self.heartbeats = Heartbeats(directory=directory, node=self.context.node)

    @property
    def own(self) -> NodePlan:
        return self.plan.nodes[self.context.node]

    def work(self, command: RoleCommand) -> int:
        """Start the roles, stay until the attempt has ended, and leave no process behind."""
        try:
            self.heartbeats.post(self.heartbeats.heartbeat, every_s=0)
            self.start_roles(command)
            end = self.watch(self.supervisor())
        except BaseException as error:
            if isinstance(error, OSError) and not self.run.config_file.exists():
                raise ValueError(f"{self.run.path}: deleted while the run was at work") from error
            self.give_up(error)
            raise
        finally:
            self.processes.end(self.timeouts.grace_s)
            self.processes.close()
            self.follow()
        return self.conclude(end)

    def start_roles(self, command: RoleCommand) -> None:
        if self.context.node == 0:
            self.say(f"{self.run.path}, attempt {self.launch.attempt}\n{describe(self.plan)}")
            self.exports = export_watch(self.run)
        for role in self.own.roles:
            log = self.run.log_file(role.name, self.launch.attempt)
            environment = role_environment(
                role,
                self.config,
                self.plan,
                node=self.own,
                launch=self.launch,
                host=self.context.host,
            )
            self.processes.start(role.name, command(self.run, role), environment, log)
            if role.name == "trainer-0":
                self.follower = LogFollower(log)

    def supervisor(self) -> Supervisor:
        if self.context.node:
            return Follower(
                context=self.context, heartbeats=self.heartbeats, timeouts=self.timeouts
            )
        return Leader(
            run=self.run,
            plan=self.plan,
            context=self.context,
            heartbeats=self.heartbeats,
            timeouts=self.timeouts,
        )

    def watch(self, supervisor: Supervisor) -> AttemptOutcome:
        """Note what happens here, give a sign of life, and go on until the outcome."""
        working = {role.name for role in self.own.trainers}
        while True:
            exited = self.processes.next_exit(self.timeouts.poll_s)
            self.follow()
            if self.exports is not None:
                self.exports.look()
            heartbeat = replace(self.heartbeats.heartbeat, stop=self.stop.reason)
            if exited and exited.code == 0 and exited.name in working:
                working.remove(exited.name)
            elif exited and not self.was_told_to_end(exited):
                heartbeat = replace(heartbeat, state="failed", failure=self.failure(exited))
            if not working and self.own.trainers and heartbeat.state == "running":
                heartbeat = replace(heartbeat, state="done")
            self.heartbeats.post(heartbeat, self.timeouts.heartbeat_s)
            if exited and heartbeat.state == "failed":
                self.processes.end(self.timeouts.grace_s)
            if end := supervisor.outcome(self.heartbeats.heartbeat):
                return end

    def was_told_to_end(self, exited: Exit) -> bool:
        """The trainer may shut an engine down at the end of the run, and at no other time."""
        ending = self.run.stop_file.exists() or self.run.read_progress().get("done", False)
        return exited.code == 0 and bool(ending)

    def failure(self, exited: Exit) -> Failure:
        what = f"{exited.describe()} on node {self.context.node} ({self.context.host})"
        if mistake := exited.mistake():
            what = f"{what}: {mistake}"
            return Failure(node=self.context.node, what=what, when=time.time())
        if not os.statvfs(self.run.path).f_bavail:  # the role could not even log it
            what += f"; {self.run.path}: {os.strerror(errno.ENOSPC)}"
        failure = Failure(node=self.context.node, what=what, when=time.time(), detail=exited.tail())
        self.say(f"{what}; the last lines of {exited.log}:\n{failure.detail}")
        return failure

    def give_up(self, error: BaseException) -> None:
        """Tell the other nodes that this one ends because of an error of its own."""
        what = f"node {self.context.node} ({self.context.host}): {type(error).__name__}: {error}"
        failure = Failure(node=self.context.node, what=what, when=time.time())
        if self.context.node == 0:
            self.heartbeats.declare_outcome(failure.outcome())
        else:
            self.heartbeats.post(
                replace(self.heartbeats.heartbeat, state="failed", failure=failure), every_s=0
            )

    def conclude(self, end: AttemptOutcome) -> int:
        """Node 0 makes the outcome known, after the requeue that ends all nodes; then leave."""
        if self.exports is not None and end.status == "done":
            self.exports.finish(EXPORTS_WAIT_S)
        if self.context.node == 0:
            if end.status == "stopped":
                self.say(f"{end.message}; {self.resume()}")
            elif end.failure is not None:
                end = self.conclude_failure(end, end.failure)
            else:
                self.say(f"attempt {self.launch.attempt}: {end.message}")
            self.heartbeats.declare_outcome(end)
        elif end.status == "failed":
            self.say(f"ends: {end.message}")
        return {"done": DONE, "stopped": STOPPED, "failed": FAILED}[end.status]

    def conclude_failure(self, end: AttemptOutcome, failure: Failure) -> AttemptOutcome:
        """Say what happened, and have the job try again unless that has been of no use before."""
        self.say(f"attempt {self.launch.attempt}: {end.message}")
        if failure.node and failure.detail:
            self.say(f"its last lines:\n{failure.detail}")
        before = note_failure(self.run, self.launch.attempt, failure)
        if before is not None:
            what = f"the same error at step {before.step} as in attempt {before.attempt}"
            self.say(f"{what}; the run stops here: {before.error}")
            return replace(end, message=f"{end.message} ({what})")
        if self.context.job_id is None:
            return end
        problem = self.ask_for_requeue()
        self.say(problem or f"job {self.context.job_id} is requeued")
        return end if problem else replace(end, status="stopped")

    def resume(self) -> str:
        """Have Slurm start the job again, or say how a person does."""
        problem = self.ask_for_requeue()
        if problem is None:
            return f"job {self.context.job_id} is requeued"
        by_hand = f"to go on: submit it again, or `megadistill train {self.run.path}`"
        return f"{problem}; {by_hand}" if problem else by_hand

    def ask_for_requeue(self) -> str | None:
        """None when Slurm starts the job again, otherwise why it does not (empty: no Slurm)."""
        if self.context.job_id is None:
            return ""
        limit = self.config.cluster.max_attempts
        if self.context.restarts >= limit:
            return f"not requeued, cluster.max_attempts {limit} is reached"
        if problem := requeue(self.context.job_id):
            return f"Slurm did not requeue job {self.context.job_id} ({problem})"
        return None

    def follow(self) -> None:
        if self.follower is not None:
            self.follower.copy()

    def say(self, text: str) -> None:
        show(f"[node {self.context.node}] {text}\n")
