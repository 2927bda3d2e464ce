"""LiveBench by its own command, in a copy of its checkout: asks the system, judges, leaves judgments.

The system is served by the shard, or is an endpoint; LiveBench sees an OpenAI-compatible address.
"""

import os
import shutil
import subprocess
from pathlib import Path

from megadistill.atomic import atomic_directory, remove_torn, write_atomic
from megadistill.inference.model_argument import ModelArgument
from megadistill.inference.serving import open_models
from megadistill.launch.shards import KnownFile, Runtime, ShardArguments

RELEASE = "2024-11-25"
COMMAND = Path("livebench/run_livebench.py")
"""In a checkout."""
JUDGMENTS = "ground_truth_judgment.jsonl"
KEY = "MEGADISTILL_SYSTEM_KEY"
"""Environment variable with the system's key, by which LiveBench is told it."""


class ExternalArguments(ShardArguments):
    """A system, and the command that asks it."""

    system: str
    model: ModelArgument
    code: KnownFile
    """`COMMAND` in a checkout."""
    python: Runtime[str]
    max_tokens: int
    options: tuple[str, ...]
    gpu: Runtime[bool]


def run(directory: Path, arguments: ExternalArguments) -> None:
    """The shard. It resumes what an earlier try left in its copy of the checkout."""
    place = directory / "checkout"
    if not place.exists():
        copy_code(arguments.code.path.parents[len(COMMAND.parts) - 1], place)
    system, model = arguments.system, arguments.model.config
    with open_models({system: model}, gpu=arguments.gpu, logs=directory) as models:
        chat = models[system]
        words = {
            "--model": chat.model,
            "--model-display-name": system,
            "--api-base": chat.base_url,
            "--api-key-name": KEY,
            "--mode": "single",
            "--bench-name": "live_bench",
            "--livebench-release-option": RELEASE,
            "--force-temperature": 0,
            "--max-tokens": arguments.max_tokens,
            "--parallel-requests": model.concurrency,
        }
        command = [arguments.python, COMMAND.name, "--resume"]
        command += [str(word) for pair in words.items() for word in pair] + list(arguments.options)
        environment = {**os.environ, KEY: chat.key}
        ended = subprocess.run(
            command,
            cwd=(place / COMMAND).parent,
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    if ended.returncode:
        raise ValueError(f"external.livebench: {' '.join(command)} ended with {ended.returncode}")
    write_atomic(directory / JUDGMENTS, judgments(place))


def copy_code(checkout: Path, place: Path) -> None:
    """The checkout without what earlier runs left in it, whole or absent."""
    remove_torn(place.parent, place.name)
    ignored = shutil.ignore_patterns(".git", "data", ".venv", "assets")
    with atomic_directory(place, sync=False) as made:
        shutil.copytree(checkout, made, ignore=ignored, symlinks=True, dirs_exist_ok=True)


def judgments(place: Path) -> str:
    """All judgments of a run as one file. Raises `ValueError` where there is none."""
    files = sorted((place / COMMAND).parent.glob(f"data/**/{JUDGMENTS}"))
    if not files:
        raise ValueError(f"external.livebench: {place} has no {JUDGMENTS}; see the shard's log")
    return "".join(file.read_text(encoding="utf-8").rstrip("\n") + "\n" for file in files)
