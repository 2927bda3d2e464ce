"""Where this process stands in its job: which node of how many, and how nodes find each other."""

import os
import secrets
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

LOCALHOST = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 20000, 10000
"""Rendezvous ports are taken from this range, below the kernel's ephemeral ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
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

    @property
    def host(self) -> str:
        return self.hosts[self.node]


def local_place() -> Place:
    """This machine alone, without Slurm."""
    return Place(node=0, num_nodes=1, hosts=(LOCALHOST,), launch_id=f"local-{secrets.token_hex(8)}")


def slurm_place(environment: Mapping[str, str] = os.environ) -> Place:
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
    hosts = expand_hosts(environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"]))
    return Place(
        node=int(environment["SLURM_NODEID"]),
        num_nodes=len(hosts),
        hosts=hosts,
        launch_id="-".join(
            part for part in (job, restarts, environment["SLURM_STEP_ID"], nonce) if part
        ),
        job_id=job,
        restarts=int(restarts),
    )


def expand_hosts(node_list: str) -> tuple[str, ...]:
    """`node[1-3]` to its names, by Slurm itself."""
    command = ["scontrol", "show", "hostnames", node_list]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return tuple(answer.stdout.split())


def requeue(job_id: str) -> str | None:
    """Have Slurm start the job again; the reason when it refuses, None when it will."""
    command = ["scontrol", "requeue", job_id]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return None if answer.returncode == 0 else answer.stderr.strip()


def rendezvous_port(place: Place, attempt: int) -> int:
    """A port for torch.distributed that is free on this node, which hosts rank 0.

    Under Slurm it is derived from the job and the attempt, because nodes may share a network
    stack and jobs a node; a taken one gives way to the next.
    """
    if place.job_id is None:
        return free_port()
    start = int(place.job_id) * 31 + attempt * 7
    for offset in range(100):
        port = FIRST_PORT + (start + offset) % NUM_PORTS
        if is_free(port):
            return port
    raise RuntimeError(f"{place.host}: found 100 ports taken from {FIRST_PORT + start % NUM_PORTS}")


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
