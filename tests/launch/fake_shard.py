"""Functions that shards of tests call, in processes of their own."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_items(directory: Path, arguments: Mapping[str, Any]) -> None:
    """Do `items` items, each once: a file an item, and a line in the ledger that counts.

    `fail_once_after`: the first try ends badly after so many items. `how`: raise, or kill itself.
    `pause_s`: seconds each item takes.
    """
    ledger = Path(arguments["ledger"])
    for item in range(arguments["items"]):
        file = directory / f"item-{item}"
        if file.exists():
            continue  # an earlier try did it
        if item == arguments.get("fail_once_after") and not (directory / "failed").exists():
            (directory / "failed").touch()
            fail(arguments.get("how", "raise"))
        time.sleep(arguments.get("pause_s", 0))
        with ledger.open("a") as stream:
            stream.write(f"{arguments['part']} {item}\n")
        file.touch()


def fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("bad luck, once")


def always_fails(directory: Path, arguments: Mapping[str, Any]) -> None:
    with Path(arguments["ledger"]).open("a") as stream:
        stream.write("tried\n")
    raise RuntimeError("bad luck, always")


def show_gpus(directory: Path, arguments: Mapping[str, Any]) -> None:
    (directory / "gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    time.sleep(arguments["pause_s"])
