"""Bandwidth of an all-reduce between the nodes of a job; prints GB/s on rank 0.

RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as under torchrun: `python -m megadistill.megatron.all_reduce`.
NCCL with one GPU a process where there are GPUs, gloo otherwise.
"""

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

ROUNDS = 5


def main() -> None:
    """Sum one large tensor a few times; bus bandwidth as NCCL's own tests define it."""
    use_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if use_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if use_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    tensor_N = torch.ones((1 << 28) if use_gpu else (1 << 22), device=device)
    dist.all_reduce(tensor_N)  # connects
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor_N)
    if use_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / ROUNDS
    world = dist.get_world_size()
    gigabytes = tensor_N.numel() * tensor_N.element_size() / 1e9
    if dist.get_rank() == 0:
        found = {"backend": backend, "gb_per_s": gigabytes / seconds * 2 * (world - 1) / world}
        sys.stdout.write(json.dumps(found) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
