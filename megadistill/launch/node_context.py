"""The position of this process in its job: its node, the other nodes, and the port where they meet."""

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megadistill.launch.processes import shielded

LOCALHOST = "127.0.0.1"
OUTPUT_SETTINGS = (
    "SQUEUE_",
    "SACCT_",
    "SINFO_",
    "SCONTROL_",
    "SLURM_TIME_FORMAT",
    "SLURM_CLUSTERS",
)
"""Beginnings of variables by which a user sets what Slurm's commands print by default: SQUEUE_FORMAT
or SQUEUE_STATES would hide jobs from us."""
FIRST_PORT, NUM_PORTS = 20000, 10000
"""Rendezvous ports are taken from this range, below the kernel's ephemeral ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeContext:
    """One node's place in a launch; equal on all nodes but for `node`."""

    node: int
    """Number of this node, from 0."""
    num_nodes: int
    hosts: tuple[str, ...]
    """Host names of all nodes, in order."""
    launch_id: str
    """Differs between two starts, also between two starts of a requeued job."""
    job_id: str | None = None
    """Slurm's job, absent without Slurm."""
    restarts: int = 0
    """How often Slurm has requeued the job."""
    second_component: int = 0
    """How many of the nodes, the last, are a heterogeneous job's second component."""

    @property
    def host(self) -> str:
        return self.hosts[self.node]


def local_context() -> NodeContext:
    """This machine alone, without Slurm."""
    return NodeContext(
        node=0, num_nodes=1, hosts=(LOCALHOST,), launch_id=f"local-{secrets.token_hex(8)}"
    )


def slurm_context(environment: Mapping[str, str] = os.environ) -> NodeContext:
    """This task's place, from the variables `srun` sets.

    `MEGADISTILL_LAUNCH`, when the job script sets it, tells apart two jobs with the same number
    (a cluster whose state was wiped counts from 1 again).
    """
    if "SLURM_STEP_ID" not in environment:
        raise ValueError(
            "SLURM_STEP_ID: not set, expected a task started by srun; "
            "without Slurm use `megadistill train`"
        )
    if environment.get("SLURM_LOCALID", "0") != "0":
        raise ValueError(
            f"SLURM_LOCALID: found {environment['SLURM_LOCALID']}, expected one task a node "
            "(--ntasks-per-node=1): it starts the node's processes itself"
        )
    job, restarts = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    nonce = environment.get("MEGADISTILL_LAUNCH", "")
    hosts, second = component_hosts(environment)
    return NodeContext(
        node=int(environment["SLURM_NODEID"]),
        num_nodes=len(hosts),
        hosts=hosts,
        launch_id="-".join(
            part for part in (job, restarts, environment["SLURM_STEP_ID"], nonce) if part
        ),
        job_id=job,
        restarts=int(restarts),
        second_component=second,
    )


def component_hosts(environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """The job's nodes in the order of SLURM_NODEID, and how many are of a second component.

    Of a heterogeneous job (`sbatch ... : ...`) the first component's come first; Slurm's list of all
    nodes is sorted by name instead.
    """
    components = environment.get("SLURM_HET_SIZE", "1")
    if components == "1":
        names = environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"])
        return expand_hosts(names), 0
    if components != "2":
        raise ValueError(
            f"SLURM_HET_SIZE: found {components} components, expected 2: trainers, then engines"
        )
    first, second = (
        expand_hosts(environment[f"SLURM_JOB_NODELIST_HET_GROUP_{group}"]) for group in range(2)
    )
    if environment.get("SLURM_NNODES") != str(len(first) + len(second)):
        raise ValueError(
            f"SLURM_NNODES: found {environment.get('SLURM_NNODES')} in this step, expected the "
            f"{len(first) + len(second)} nodes of both components (srun --het-group=0,1)"
        )
    return (*first, *second), len(second)


def expand_hosts(node_list: str) -> tuple[str, ...]:
    """`node[1-3]` to its names, by Slurm itself, or as the job script wrote them down.

    In a container there is often no scontrol; the job script runs outside.
    """
    if shutil.which("scontrol") is None and node_list == os.environ.get("SLURM_JOB_NODELIST"):
        return tuple(os.environ["MEGADISTILL_HOSTS"].split(","))
    return tuple(ask_slurm(["scontrol", "show", "hostnames", node_list]).stdout.split())


def ask_slurm(
    command: Sequence[str], *, check: bool = True, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands and keep what it says, whatever a user has it print by default.

    Raises `FileNotFoundError` or a `subprocess.SubprocessError`.
    """
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=check,
        timeout=timeout_s,
        env={k: v for k, v in os.environ.items() if not k.startswith(OUTPUT_SETTINGS)},
    )


def own_job(environment: Mapping[str, str]) -> str:
    """The number by which scontrol knows this job, and no other task of its array.

    The last task of an array has the array's own SLURM_JOB_ID.
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def requeue(job_id: str, behind: Sequence[str] = ()) -> str | None:
    """Have Slurm start the job again; the reason when it does not, None when it will.

    `behind` are jobs that must have ended before, however; until then this one holds no node. A
    cancelled job is left alone: scontrol would bring it back to life.
    """
    if shutil.which("scontrol") is None:
        return ask_job_script()
    if is_cancelled(job_id):
        return "it was cancelled"
    if not behind:
        return scontrol("requeue", job_id)
    with shielded():  # the first of these ends this process and its children, the others included
        problem = scontrol("requeuehold", job_id)
        if problem is None:
            # Only a job that waits can be told for what; where Slurm has forgotten them, for nothing.
            scontrol("update", f"JobId={job_id}", f"Dependency=afterany:{':'.join(behind)}")
            problem = scontrol("release", job_id)
    return problem


def scontrol(*words: str) -> str | None:
    """What scontrol complains of, None when it does what it is told."""
    answer = ask_slurm(["scontrol", *words], check=False)
    return None if answer.returncode == 0 else answer.stderr.strip()


def is_cancelled(job_id: str) -> bool:
    """Whether Slurm is ending the job, other than for its time limit.

    While it does, the state reads COMPLETING, whatever the reason.
    """
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T %L"]
    answer = ask_slurm(command, check=False)
    state, _, time_left = answer.stdout.strip().partition(" ")
    at_limit = time_left.startswith(("0:", "INVALID"))
    return state == "CANCELLED" or (state == "COMPLETING" and not at_limit)


def ask_job_script() -> str | None:
    """In a container without scontrol: the job script requeues when it finds this file."""
    wanted = os.environ.get("MEGADISTILL_REQUEUE")
    if wanted is None:
        return "found no scontrol here and no MEGADISTILL_REQUEUE from the job script"
    Path(wanted).touch(mode=0o600)
    return None


def rendezvous_port(context: NodeContext, attempt: int) -> int:
    """A port for torch.distributed that is free on this node, which hosts rank 0.

    Under Slurm it is derived from the job and the attempt, because nodes may share a network
    stack and jobs a node; a taken one gives way to the next.
    """
    if context.job_id is None:
        return free_port()
    start = int(context.job_id) * 31 + attempt * 7
    for offset in range(100):
        port = FIRST_PORT + (start + offset) % NUM_PORTS
        if is_free(port):
            return port
    raise RuntimeError(
        f"{context.host}: found 100 ports taken from {FIRST_PORT + start % NUM_PORTS}"
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    """Whether one can listen on `port` of any interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
