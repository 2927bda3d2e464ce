"""The command line and the environment of a role."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megadistill.config import RunConfig
from megadistill.launch.layout import Layout, NodePlan, Role
from megadistill.rundir import RunDir

RoleCommand = Callable[[RunDir, Role], list[str]]
"""Builds the command line of a role."""


def role_command(run: RunDir, role: Role) -> list[str]:
    """The real roles; tests pass another function."""
    if role.kind == "trainer":
        return [sys.executable, "-m", "megadistill.trainer", str(run.path)]
    module = "megadistill.rollout.vllm_server"
    return [sys.executable, "-m", module, str(run.path), "--index", str(role.index)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What node 0 decided for one attempt and tells the others."""

    launch_id: str
    attempt: int
    master_port: int
    hosts: tuple[str, ...] = ()
    """Names of the nodes, in order; on the first the trainers meet."""
    roles: tuple[str, ...] = ()
    """What each of them runs, for people."""


MALLOC = "glibc.malloc.hugetlb=1"
"""Huge pages for large tensors, which a CPU run allocates anew all the time: a fifth faster. Keeping
freed ones (mmap_max=0) would save another tenth, but holds on to what a checkpoint needs: 4 GiB."""

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def role_environment(
    role: Role, config: RunConfig, plan: Layout, *, node: NodePlan, launch: Launch, host: str
) -> dict[str, str]:
    """The variables a role sees: the node's own, the rendezvous, its GPUs or its CPU threads.

    Trainers of a node see all trainer GPUs of the node, each takes number LOCAL_RANK of them, as
    under torchrun; an engine sees its own GPUs only. On a CPU run no GPU is visible, whatever
    Slurm offers.
    """
    result = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    result |= {"MEGADISTILL_HOST": host, "MEGADISTILL_ATTEMPT": str(launch.attempt)}
    result["PYTHONUNBUFFERED"] = "1"
    # Megatron and torch warn dozens of times at import of what no user of this project can change.
    result.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    gpus = role.gpus
    if role.kind == "trainer":
        gpus = tuple(gpu for trainer in node.trainers for gpu in trainer.gpus)
        result |= {
            "RANK": str(role.index),
            "WORLD_SIZE": str(plan.trainer_world),
            "LOCAL_RANK": str(node.trainers.index(role)),
            "LOCAL_WORLD_SIZE": str(len(node.trainers)),
            "MASTER_ADDR": launch.hosts[0],
            "MASTER_PORT": str(launch.master_port),
        }
    result["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(gpus, os.environ))
    if not gpus:
        result["OMP_NUM_THREADS"] = str(cpu_threads(role, config))
        result.setdefault("GLIBC_TUNABLES", MALLOC)
    return result


def visible_gpus(gpus: tuple[int, ...], environment: Mapping[str, str]) -> list[str]:
    """The names of a node's GPUs by their numbers, where the job may use only some of a node."""
    offered = environment.get("CUDA_VISIBLE_DEVICES")
    if offered is None or not gpus:
        return [str(gpu) for gpu in gpus]
    names = [name for name in offered.split(",") if name]
    if len(names) <= max(gpus):
        raise ValueError(
            f"cluster.gpus_per_node: found a role on GPU {max(gpus)}, but this node offers the job "
            f"{len(names)} (CUDA_VISIBLE_DEVICES={offered})"
        )
    return [names[gpu] for gpu in gpus]


def cpu_threads(role: Role, config: RunConfig) -> int:
    """CPU threads of one process of this kind."""
    if role.kind == "engine" and config.rollout is not None:
        return config.rollout.threads
    return config.parallel.threads
