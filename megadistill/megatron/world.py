"""This process's place among all trainer processes: ranks, groups, device."""

import ipaddress
import os
import resource
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megadistill.config.schema import ParallelConfig
from megadistill.megatron.megatron_call import calls_megatron


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Ranks and process groups of this process; the same layout on every one."""

    device: torch.device
    groups: ProcessGroupCollection
    opened_here: bool
    """Whether `connect` started torch.distributed, so that `disconnect` must end it."""

    @property
    def rank(self) -> int:
        """Global rank; rank 0 is the writer."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Number of trainer processes."""
        return dist.get_world_size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return bool(self.groups.pp.rank() == 0)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return bool(self.groups.pp.rank() == self.groups.pp.size() - 1)

    @property
    def is_reporting_rank(self) -> bool:
        """Whether this rank's results count in sums over all ranks.

        Tensor-parallel ranks of a last stage hold equal results, other stages none.
        """
        return self.is_last_stage and bool(self.groups.tp.rank() == 0)


@calls_megatron
def connect(
    parallel: ParallelConfig, *, device: torch.device, seed: int, timeout: timedelta
) -> World:
    """Join the other trainer processes and lay them out; every process calls it.

    Ranks come from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them this process is
    alone. Uses gloo on a CPU, nccl on a GPU (LOCAL_RANK or SLURM_LOCALID picks it). Raises
    `ValueError` if the layout does not fit the number of processes.
    """
    if device.type == "cuda":
        torch.cuda.set_device(_local_rank())
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        torch.set_num_threads(parallel.threads)
    opened_here = not dist.is_initialized()
    if opened_here:
        _check_size(parallel, int(os.environ.get("WORLD_SIZE", "1")))
        _open(device, timeout)
    _check_size(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() / 60)),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    _seed(seed, groups)
    return World(device=device, groups=groups, opened_here=opened_here)


def disconnect(world: World) -> None:
    """Undo `connect`; every process calls it."""
    parallel_state.destroy_model_parallel()
    if world.opened_here:
        dist.destroy_process_group()


def most_memory_gib(world: World) -> float:
    """The largest memory of a rank: its GPU's peak since the last call, or what it has resident."""
    if world.device.type == "cuda":
        size = torch.cuda.max_memory_allocated(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
    else:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        size = int(pages) * resource.getpagesize()
    most = torch.tensor(size / 2**30, device=world.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def pick_device(wanted: str, gpus_per_node: int) -> torch.device:
    """`auto` is a GPU where the cluster has them. Raises `ValueError` where torch sees none."""
    name = wanted if wanted != "auto" else "cuda" if gpus_per_node > 0 else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: found {wanted} with cluster.gpus_per_node = {gpus_per_node}, expected a GPU, "
            f"but torch {torch.__version__} sees none (torch.version.cuda is {torch.version.cuda}; "
            "None is a build for CPUs); set device: cpu to run without"
        )
    return torch.device(name)


def _open(device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _rendezvous(rank, size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        # Alone: a store in memory needs no port that another process could hold.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _rendezvous(rank: int, size: int, timeout: timedelta) -> dist.TCPStore:  # type: ignore[name-defined]
    """The store where the ranks meet; rank 0 keeps it and listens on MASTER_ADDR alone.

    torch's own listens on every address, and asks nobody who they are. Where MASTER_ADDR is a
    loopback address to its own node, as some sites' /etc/hosts have it, other nodes could not
    reach it, so that it listens on all as torch's does.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if one_node:  # gloo's and NCCL's own listeners, too
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listener = None
    if rank == 0:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
        if one_node or not ipaddress.ip_address(address).is_loopback:
            family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
            listener = socket.create_server((str(address), port), family=family, backlog=size + 16)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _check_size(parallel: ParallelConfig, size: int) -> None:
    model_size = parallel.tp * parallel.pp * parallel.cp
    wanted = model_size * parallel.dp if parallel.dp else -(-size // model_size) * model_size
    if size != wanted:
        raise ValueError(
            f"parallel: found {size} trainer processes for tp x pp x cp = {model_size} and "
            f"dp = {parallel.dp or 'any'}, expected {wanted}"
        )


def _seed(seed: int, groups: ProcessGroupCollection) -> None:
    """Same numbers on ranks that hold copies, others on other stages and shards."""
    stage_seed = seed + 100 * groups.pp.rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def _local_rank() -> int:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0
