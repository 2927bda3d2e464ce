"""What a shard runs: torch and vLLM read the environment when they are imported, so it comes first."""

# ruff: noqa: PLC0415 - the imports are what has to wait
import json
import logging
import os
from pathlib import Path
from typing import Any

from megadistill.launch.shards import ShardArguments
from megadistill.rollout.vllm_arguments import vllm_environment


class PlainArguments(ShardArguments):
    """Arguments by name."""

    values: dict[str, Any]  # plain JSON values


def rewrite(directory: Path, arguments: PlainArguments) -> None:
    """Eq. (1): rewrite a part of the records."""
    set_up(directory)
    from megadistill.refine import rewriting

    rewriting.rewrite(directory, arguments.values)


def measure(directory: Path, arguments: PlainArguments) -> None:
    """Eq. (2): similarities of a part of the rewrites."""
    set_up(directory)
    from megadistill.refine import similarity

    similarity.measure(directory, arguments.values)


def fuse(directory: Path, arguments: PlainArguments) -> None:
    """Eq. (4): fuse a part of what passed."""
    set_up(directory)
    from megadistill.refine import fusing

    fusing.fuse(directory, arguments.values)


def diagnose(directory: Path, arguments: PlainArguments) -> None:
    """Measure the refined set."""
    set_up(directory)
    from megadistill.refine import diagnosing

    diagnosing.diagnose(directory, arguments.values)


def set_up(directory: Path) -> None:
    """The process's threads and its log, by the stage's runtime.json (see `stages`)."""
    runtime = json.loads((directory.absolute().parents[2] / "runtime.json").read_text())
    os.environ.update(vllm_environment(runtime["engine"]["threads"], gpu=runtime["gpu"]))
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("megadistill").setLevel(logging.INFO)
