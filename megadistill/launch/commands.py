"""Shards that are `megadistill` command lines: the stages of campaigns, the work on exports."""

import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megadistill.config.cluster import ClusterConfig
from megadistill.config.work import WorkConfig
from megadistill.launch.shards import Shard, ShardArguments
from megadistill.launch.stages import Limits


class CommandArguments(ShardArguments):
    """A `megadistill` command line."""

    words: tuple[str, ...]
    depends: Any = None
    """What else identifies it (any JSON value)."""


def run_command(directory: Path, arguments: CommandArguments) -> None:
    """A command line, as if typed, in this process."""
    sys.argv = ["megadistill", *arguments.words]
    try:
        runpy.run_module("megadistill", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


def command_shard(
    words: Sequence[str], *, label: str = "", depends: Any = None
) -> Shard[CommandArguments]:
    """A shard that is a command line; `depends` (any JSON value) enters its identity beside the words."""
    arguments = CommandArguments(words=tuple(words), depends=depends)
    return Shard(function=run_command, arguments=arguments, label=label)


def work_shards(
    work: WorkConfig, *, label: str, config: Path, depends: Any = None
) -> list[Shard[CommandArguments]]:
    """The command lines of some work, of which `config` is the configuration if it has one.

    `depends` (any JSON value) is part of what they are.
    """
    count = max(work.array, 1)
    shards = []
    for index in range(count):
        words = [work.verb, *([str(config)] if work.config is not None else [])]
        marks = {"{shard}": str(index), "{shards}": str(count)} if work.array else {}
        words += [fill(word, marks) for word in work.args]
        own = f"{label}-{index}" if work.array else label
        shards.append(command_shard(words, label=own, depends=depends))
    return shards


def limits_of(work: WorkConfig) -> Limits:
    """How many at a time, and how often one that fails."""
    return Limits(concurrency=work.concurrency, tries=work.tries)


def fill(word: str, marks: Mapping[str, str]) -> str:
    """The word with each mark replaced by its text, other braces as they are."""
    for mark, text in marks.items():
        word = word.replace(mark, text)
    return word


def with_resources(cluster: ClusterConfig, work: WorkConfig) -> ClusterConfig:
    """`cluster`, changed as the work's `resources` say."""
    changed = cluster.model_copy(update=work.resources.model_dump(exclude_none=True))
    for problem in changed.contradictions():
        raise ValueError(f"resources.{problem}")
    return changed
