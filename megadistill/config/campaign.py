"""A campaign: named stages, each a megadistill command line, and which of them need which."""

from collections.abc import Sequence
from dataclasses import field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from megadistill.config.cluster import ClusterConfig
from megadistill.config.fields import STRICT
from megadistill.config.load import read_tree, validate
from megadistill.config.work import WorkConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Becomes the name of a directory and of a job."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageConfig(WorkConfig):
    """One step of a campaign."""

    needs: list[str] = field(default_factory=list)
    """Stages that must be done before."""
    inputs: list[str] = field(default_factory=list)
    """Files or directories that exist beforehand and whose change means to run the stage again."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CampaignConfig:
    """Stages as dependent jobs; `megadistill campaign` takes exactly this."""

    name: Name
    """Names the campaign's directory, `runs_dir/name`, and begins its jobs' names."""
    runs_dir: str = "runs"
    stages: dict[Name, StageConfig]
    """By name; the order is that of the table only, `needs` decides who waits for whom."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The site, and what a stage asks for unless its `resources` say otherwise. A train stage takes
    from it what its own configuration leaves at the default."""

    def __post_init__(self) -> None:
        problems = [
            f"stages.{name}.needs: found {need!r}, expected one of {sorted(self.stages)}"
            for name, stage in self.stages.items()
            for need in stage.needs
            if need not in self.stages
        ]
        try:
            self.ordered()
        except CycleError as error:
            problems.append(f"stages: found {' -> '.join(error.args[1])}, expected no circle")
        if problems:
            raise ValueError("; ".join(problems))

    def ordered(self) -> list[str]:
        """The stages' names, each after those it needs."""
        known = {n: [x for x in s.needs if x in self.stages] for n, s in self.stages.items()}
        return list(TopologicalSorter(known).static_order())


_ADAPTER: TypeAdapter[CampaignConfig] = TypeAdapter(CampaignConfig)


def is_campaign(path: str | Path) -> bool:
    """Whether the file describes a campaign rather than a run."""
    return "stages" in read_tree(path)


def load_campaign(path: str | Path, overrides: Sequence[str] = ()) -> CampaignConfig:
    """Read, merge and validate; `ConfigError` with all problems at once."""
    return parse_campaign(read_tree(path, overrides), source=str(path))


def parse_campaign(tree: dict[str, Any], source: str = "campaign") -> CampaignConfig:
    """Validate a plain mapping (any: it is YAML)."""
    return validate(_ADAPTER, tree, source)


def dump_campaign(config: CampaignConfig) -> str:
    """The resolved campaign as YAML, itself a valid input."""
    tree = _ADAPTER.dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


_CLUSTER: TypeAdapter[ClusterConfig] = TypeAdapter(ClusterConfig)


def load_cluster(config: str | None, profile: str | None) -> ClusterConfig:
    """The `cluster` section of a run or campaign, with a site profile's settings over it."""
    tree: dict[str, Any] = {}
    for file in (config, profile):
        if file is not None:
            tree |= read_tree(file).get("cluster", {})
    return validate(_CLUSTER, tree, source=str(profile or config or "cluster"))
