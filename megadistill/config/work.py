"""A piece of work besides the run itself: a command line, how many of it, and what it needs."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megadistill.config.fields import Config, NaturalInt, PositiveInt

Verb = Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")]
NOT_WORK = ("campaign", "doctor", "node", "shard", "status", "submit")
"""Verbs that start or watch work and are none themselves."""


class ResourcesConfig(Config):
    """What one stage asks of Slurm where that differs from `cluster`; absent: as there."""

    nodes: PositiveInt | None = None
    """Only training uses more than one."""
    gpus_per_node: NaturalInt | None = None
    cpus_per_node: PositiveInt | None = None
    time_minutes: PositiveInt | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclusive: bool | None = None


def names_each(word: str) -> bool:
    """Whether an argument gives every task of an array a run of its own."""
    return word.startswith("name=") and "{shard}" in word


class WorkConfig(Config):
    """One megadistill command line, or an array of them."""

    verb: Verb
    """`train`, `refine`, `eval`, `convert`, `report`, ..."""
    config: str | None = None
    """The verb's configuration file; its content is kept as it is when the job is submitted."""
    args: list[str] = Field(default_factory=list)
    """Further words, each passed as it is but for `{shard}` and `{shards}`: an array's task number,
    from 0, and how many there are."""
    array: NaturalInt = 0
    """Number of tasks; 0: one job. Of `train`, a sweep: each task is a run on one node."""
    concurrency: PositiveInt = 8
    """Tasks of the array that run at the same time."""
    tries: PositiveInt = 3
    """How often a failing task is run before it is given up."""
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)

    def contradictions(self) -> Iterator[str]:
        if self.verb in NOT_WORK:
            yield (f"verb: found {self.verb!r}, expected one that does work, e.g. 'train'")
        if self.verb == "train" and self.config is None:
            yield "verb: train needs `config`"
        if self.verb == "train" and self.array and not any(map(names_each, self.args)):
            yield "args: found an array of runs, expected a `name=` with {shard} in it"
        if not self.array and any("{shard" in word for word in self.args):
            yield "args: found {shard}, expected `array` beside it"
