"""Runs a function on several real processes that meet over gloo, and brings back what it returns."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
STORE = "TEST_WORLD_STORE"
"""Names the file in which the ranks meet next."""


def run_world(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 240) -> Any:
    """What `function(*args)` returns on rank 0 of `size` processes in one process group.

    `function` is importable and runs on every rank. Raises `AssertionError` with the traceback of
    the rank that failed first, or if the world is not done in time; no process is left behind.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, size, directory, function, args))
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, directory, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return pickle.loads((directory / "result").read_bytes())


def _wait(processes: Sequence[BaseProcess], directory: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    failures = sorted(directory.glob("failure*"), key=lambda file: file.stat().st_mtime_ns)
    assert not failures, failures[0].read_text()
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes of the ranks: {codes}"
    assert None not in codes, f"not done in time, exit codes of the ranks so far: {codes}"


def renew_world() -> None:
    """Close every process group and meet again; nothing to do for a process without a world.

    Each layout opens dozens of groups, which Megatron never closes, with three threads in each.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    os.environ[STORE] += "+"
    _meet()


def _meet() -> None:
    """Meeting in a file needs no port that another process could take first."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ[STORE]}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )


def _rank(
    rank: int, size: int, directory: Path, function: Callable[..., Any], args: Sequence[Any]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), **{STORE: f"{directory}/store"})
    try:
        _meet()
        result = function(*args)
        dist.barrier()
        if rank == 0:
            (directory / "result").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - reported, and the process ends with an error
        report = directory / f".failure{rank}"
        report.write_text(f"rank {rank} of {size}:\n{traceback.format_exc()}")
        report.rename(directory / f"failure{rank}")
        raise SystemExit(1) from None
