"""Functions that shards of tests call, in processes of their own."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Literal

from megadistill.launch.shards import MAY_WAIT, Runtime, ShardArguments, ShardFolder, Upstream
from megadistill.launch.stopping import STOPPED


class ItemsArguments(ShardArguments):
    ledger: Path
    part: int
    items: int = 3
    fail_once_after: int | None = None
    """The first try ends badly after so many items."""
    how: Literal["raise", "kill"] = "raise"
    pause_s: Runtime[float] = 0
    """Seconds each item takes."""


def add_items(directory: Path, arguments: ItemsArguments) -> None:
    """Do `items` items, each once: a file an item, and a line in the ledger that counts."""
    for item in range(arguments.items):
        file = directory / f"item-{item}"
        if file.exists():
            continue  # an earlier try did it
        if item == arguments.fail_once_after and not (directory / "failed").exists():
            (directory / "failed").touch()
            fail(arguments.how)
        time.sleep(arguments.pause_s)
        with arguments.ledger.open("a") as stream:
            stream.write(f"{arguments.part} {item}\n")
        file.touch()


def fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("bad luck, once")


class LedgerArguments(ShardArguments):
    ledger: Path


def always_fails(directory: Path, arguments: LedgerArguments) -> None:
    with arguments.ledger.open("a") as stream:
        stream.write("tried\n")
    raise RuntimeError("bad luck, always")


class GpusArguments(ShardArguments):
    part: int
    pause_s: float


def show_gpus(directory: Path, arguments: GpusArguments) -> None:
    (directory / "gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    (directory / "own").write_text(os.environ.get("OWN", ""))
    time.sleep(arguments.pause_s)


class WaitsArguments(ShardArguments):
    jobs: tuple[str, ...]


def waits(directory: Path, arguments: WaitsArguments) -> None:
    """The first try leaves to go on after the jobs; the second says where it was in the queue."""
    assert os.environ[MAY_WAIT]
    own = ShardFolder(directory.parent)
    if not own.waits()[0]:
        own.wait_for(arguments.jobs)
        sys.exit(STOPPED)
    (directory / "restarts").write_text(os.environ["SLURM_RESTART_COUNT"])


class SumArguments(ShardArguments):
    items: Upstream


def add_up(directory: Path, arguments: SumArguments) -> None:
    """The number of items that other shards have done."""
    count = sum(len(list(output.glob("item-*"))) for output in arguments.items.outputs)
    (directory / "sum").write_text(str(count))
