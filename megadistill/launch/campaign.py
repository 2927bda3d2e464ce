"""Campaigns: stages of different sizes as dependent Slurm jobs, or one after the other right here.

    RUNS/NAME/campaign.yaml         the resolved campaign, itself a valid input
    RUNS/NAME/configs/STAGE-*.yaml  the stages' configurations as they were submitted
    RUNS/NAME/stages/STAGE/         shards (`launch/stages.py`), one unless it is an array;
                                    for a train stage what was submitted, its run is elsewhere

A stage is identified by a hash of its command, its configuration's content, its inputs' content, and
the hashes of the stages it needs. Submitting again runs the stages that are not done under the hash
they have now; so a changed configuration also repeats what depends on it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megadistill.atomic import write_atomic
from megadistill.config import CampaignConfig, RunConfig, dump, load, read_tree
from megadistill.config.campaign import StageConfig
from megadistill.config.cluster import ClusterConfig
from megadistill.launch.allowed_paths import check_root
from megadistill.launch.commands import CommandArguments, limits_of, with_resources, work_shards
from megadistill.launch.gang import Gang
from megadistill.launch.node import open_run
from megadistill.launch.shards import Shard, content_hash, fingerprint
from megadistill.launch.slurm import gone_if_refused
from megadistill.launch.staged_work import Stage, read_plan, run_stages, submit_stages, write_plan
from megadistill.launch.stages import ShardedStage
from megadistill.rundir import RunDir


@dataclass(kw_only=True)
class StagePlan:
    """A stage with everything that follows from the configurations as they are now."""

    name: str
    config: StageConfig
    root: Path
    campaign: CampaignConfig
    needs: list["StagePlan"] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        """Identifies the work and all it depends on."""
        return content_hash(
            {
                "verb": self.config.verb,
                "args": self.config.args,
                "array": self.config.array,
                "config": self.settings,
                "inputs": [fingerprint(self.input_path(path)) for path in self.config.inputs],
                "needs": [need.digest for need in self.needs],
            }
        )

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """What the stage's configuration file says (any: it is YAML), includes merged.

        Of a run, what it computes; where it runs does not make it another.
        """
        if self.is_gang:
            config = self.open_run()[0].model_copy(update={"cluster": ClusterConfig()})
            settings: dict[str, Any] = yaml.safe_load(dump(config))
            return settings
        return None if self.config.config is None else read_tree(self.config.config)

    def input_path(self, path: str) -> Path:
        if not Path(path).exists():
            raise ValueError(
                f"stages.{self.name}.inputs: found {path!r}, which does not exist; what another "
                "stage makes is followed through `needs`"
            )
        return Path(path)

    @property
    def is_gang(self) -> bool:
        """Whether it is one run; an array of them, a sweep, is shards like any other."""
        return self.config.verb == "train" and not self.config.array

    def runnable(self) -> Stage:
        """What is run, submitted and shown."""
        folder, job_name = self.root / "stages" / self.name, f"{self.campaign.name}-{self.name}"
        if self.is_gang:
            config, run = self.open_run()
            return Gang(
                name=self.name,
                root=folder,
                needs=self.config.needs,
                config=config,
                run=run,
                digest=self.digest,
                job_name=job_name,
            )
        return ShardedStage(
            name=self.name,
            root=folder,
            shards=self.shards(),
            limits=limits_of(self.config),
            needs=self.config.needs,
            cluster=with_resources(self.campaign.cluster, self.config),
            job_name=job_name,
            verb=self.config.verb,
        )

    def open_run(self) -> tuple[RunConfig, RunDir]:
        """A train stage's run, with the resources it gets here."""
        assert self.config.config is not None
        config, run = open_run(self.config.config, self.config.args)
        site = inherit(config.cluster, self.campaign.cluster)
        return config.model_copy(update={"cluster": with_resources(site, self.config)}), run

    def shards(self) -> list[Shard[CommandArguments]]:
        """The command lines of a stage that is no run; their configuration is the campaign's copy."""
        return work_shards(
            self.config, label=self.name, config=self.kept_config, depends=self.digest
        )

    def commands(self) -> list[list[str]]:
        """Its command lines."""
        if self.is_gang:
            return [["train", str(self.config.config), *self.config.args]]
        return [list(shard.arguments.words) for shard in self.shards()]

    @property
    def kept_config(self) -> Path:
        return self.root / "configs" / f"{self.name}-{self.digest}.yaml"

    def keep_config(self) -> None:
        if self.settings is not None and not self.is_gang:
            text = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
            write_atomic(self.kept_config, text)


def inherit(own: ClusterConfig, site: ClusterConfig) -> ClusterConfig:
    """`own`, with what it leaves at the default taken from `site`."""
    default = ClusterConfig()
    taken = {
        name: getattr(site, name)
        for name in ClusterConfig.model_fields
        if getattr(own, name) == getattr(default, name)
    }
    return own.model_copy(update=taken)


@dataclass(kw_only=True)
class Campaign:
    """A campaign and its directory. Every verb of `megadistill campaign` is a method."""

    config: CampaignConfig
    plans: dict[str, StagePlan]
    """In an order in which each comes after those it needs."""

    @classmethod
    def of(cls, config: CampaignConfig) -> "Campaign":
        root = (Path(config.runs_dir) / config.name).absolute()
        plans: dict[str, StagePlan] = {}
        for name in config.ordered():
            stage = config.stages[name]
            needs = [plans[need] for need in stage.needs]
            plans[name] = StagePlan(
                name=name, config=stage, root=root, campaign=config, needs=needs
            )
        return cls(config=config, plans=plans)

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> "Campaign":
        """From a configuration file, or from a campaign's directory.

        What is relative in that one's configuration is so to where it was submitted: go there.
        """
        folder = Path(source).absolute()
        if not folder.is_dir():
            return cls.of(load(CampaignConfig, source, overrides))
        if not (folder / "campaign.yaml").exists():
            raise ValueError(f"{source}: found no campaign.yaml, expected a campaign's directory")
        config = load(CampaignConfig, folder / "campaign.yaml", overrides)
        os.chdir(read_plan(folder).directory)
        return cls.of(config)

    @property
    def root(self) -> Path:
        return (Path(self.config.runs_dir) / self.config.name).absolute()

    def commands(self) -> dict[str, list[list[str]]]:
        """Every stage's command lines, to be checked before anything is submitted."""
        return {name: plan.commands() for name, plan in self.plans.items()}

    def begin(self) -> None:
        """Make the directory (mode 0700) and keep the configurations there."""
        check_root("runs_dir", self.root)
        for plan in self.plans.values():
            assert plan.digest, "problems of any stage come up before anything is written"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("configs", "stages"):
            (self.root / name).mkdir(mode=0o700, exist_ok=True)
        for name, plan in self.plans.items():
            (self.root / "stages" / name).mkdir(mode=0o700, exist_ok=True)
            plan.keep_config()
        write_atomic(self.root / "campaign.yaml", dump(self.config))
        write_plan(self.root, list(self.stages.values()))

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in order."""
        return {name: plan.runnable() for name, plan in self.plans.items()}

    def submit(self) -> dict[str, list[str]]:
        """Submit what is neither done nor in the queue; the jobs of each stage that is to run."""
        with gone_if_refused(self.root, is_new=not self.root.exists()):
            self.begin()
            return submit_stages(list(self.stages.values()))

    def run_here(self) -> bool:
        """The stages one after the other on this machine, without Slurm; whether all ended well."""
        self.begin()
        return run_stages(list(self.stages.values()))
