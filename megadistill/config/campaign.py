"""A campaign: named stages, each a megadistill command line, and which of them need which."""

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pydantic import Field

from megadistill.config.cluster import ClusterConfig
from megadistill.config.fields import Config, Name
from megadistill.config.loading import parse, read_tree
from megadistill.config.work import WorkConfig


class StageConfig(WorkConfig):
    """One step of a campaign."""

    needs: list[str] = Field(default_factory=list)
    """Stages that must be done before."""
    inputs: list[str] = Field(default_factory=list)
    """Files or directories that exist beforehand and whose change means to run the stage again."""


class CampaignConfig(Config):
    """Stages as dependent jobs; `megadistill campaign` takes exactly this."""

    name: Name
    """Names the campaign's directory, `runs_dir/name`, and begins its jobs' names."""
    runs_dir: str = "runs"
    stages: dict[Name, StageConfig]
    """By name; the order is that of the table only, `needs` decides who waits for whom."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """The site, and what a stage asks for unless its `resources` say otherwise. A train stage takes
    from it what its own configuration leaves at the default."""

    def contradictions(self) -> Iterator[str]:
        for name, stage in self.stages.items():
            for need in stage.needs:
                if need not in self.stages:
                    known = sorted(self.stages)
                    yield f"stages.{name}.needs: found {need!r}, expected one of {known}"
        try:
            self.ordered()
        except CycleError as error:
            yield f"stages: found {' -> '.join(error.args[1])}, expected no circle"

    def ordered(self) -> list[str]:
        """The stages' names, each after those it needs."""
        known = {n: [x for x in s.needs if x in self.stages] for n, s in self.stages.items()}
        return list(TopologicalSorter(known).static_order())


def load_cluster(config: str | None, profile: str | None) -> ClusterConfig:
    """The `cluster` section of a run or campaign, with a site profile's settings over it."""
    tree: dict[str, Any] = {}
    for file in (config, profile):
        if file is not None:
            tree |= read_tree(file).get("cluster", {})
    return parse(ClusterConfig, tree, source=str(profile or config or "cluster"))
