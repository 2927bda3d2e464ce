"""Campaigns: stages of different sizes as dependent Slurm jobs, or one after the other right here.

    RUNS/NAME/campaign.yaml         the resolved campaign, itself a valid input
    RUNS/NAME/configs/STAGE-*.yaml  the stages' configurations as they were submitted
    RUNS/NAME/stages/STAGE/         shards (`launch/stages.py`), one unless it is an array;
                                    for a train stage what was submitted, its run is elsewhere

A stage is identified by a hash of its command, its configuration's content, its inputs' content, and
the hashes of the stages it needs. Submitting again runs the stages that are not done under the hash
they have now; so a changed configuration also repeats what depends on it.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megadistill.atomic import write_atomic
from megadistill.config import CampaignConfig, RunConfig, dump, load, read_tree
from megadistill.config.campaign import StageConfig
from megadistill.config.cluster import ClusterConfig
from megadistill.launch.allowed_paths import check_root
from megadistill.launch.commands import with_resources, work_stage
from megadistill.launch.gang import submit_gang
from megadistill.launch.heartbeats import create_run, read_json
from megadistill.launch.node import open_run
from megadistill.launch.shards import content_hash, fingerprint, say
from megadistill.launch.slurm import live_jobs
from megadistill.launch.stages import (
    ShardedStage,
    StageState,
    add_job,
    cancel,
    jobs_in_queue,
    read_jobs,
    status_of,
)
from megadistill.rundir import RunDir


@dataclass(kw_only=True)
class Stage:
    """A stage with everything that follows from the configurations as they are now."""

    name: str
    config: StageConfig
    root: Path
    campaign: CampaignConfig
    needs: list["Stage"] = field(default_factory=list)

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
            config = self.run[0].model_copy(update={"cluster": ClusterConfig()})
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

    @cached_property
    def run(self) -> tuple[RunConfig, RunDir]:
        """A train stage's run, with the resources it gets here."""
        assert self.config.config is not None
        config, run = open_run(self.config.config, self.config.args)
        site = inherit(config.cluster, self.campaign.cluster)
        return config.model_copy(update={"cluster": with_resources(site, self.config)}), run

    @property
    def cluster(self) -> ClusterConfig:
        return with_resources(self.campaign.cluster, self.config)

    @property
    def kept_config(self) -> Path:
        """The copy of its configuration that the campaign keeps."""
        return self.root / "configs" / f"{self.name}-{self.digest}.yaml"

    @cached_property
    def work(self) -> ShardedStage:
        """The command lines of a stage that is no gang."""
        return work_stage(
            *(self.config, self.folder),
            label=self.name,
            config=self.kept_config,
            depends=self.digest,
        )

    def keep_config(self) -> None:
        if self.settings is not None and not self.is_gang:
            text = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
            write_atomic(self.kept_config, text)

    @property
    def folder(self) -> Path:
        return self.root / "stages" / self.name

    @property
    def is_done(self) -> bool:
        if not self.is_gang:
            return self.work.is_done
        return bool(self.run[1].read_progress().get("done")) and not self.is_stale

    @property
    def is_stale(self) -> bool:
        """Whether a train stage's run was begun when what it depends on was something else."""
        begun = self.run[1].config_file.exists()
        return begun and self.begun_as not in (None, self.digest)

    @property
    def begun_as(self) -> str | None:
        """The digest under which a train stage was last submitted."""
        values = read_json(self.folder / "submitted.json")
        return None if values is None else str(values["digest"])

    def begin_run(self) -> RunDir:
        """Write a train stage's run directory; `ValueError` when it holds another run."""
        config, run = self.run
        if self.is_stale:
            raise ValueError(
                f"stages.{self.name}: {run.path} holds a run that was made from other inputs; "
                "change its `name`, or delete that directory"
            )
        create_run(run, config)
        write_atomic(self.folder / "submitted.json", json.dumps({"digest": self.digest}))
        return run

    def submit(self, live: Mapping[str, str], after: Sequence[str]) -> list[str]:
        """The jobs after which it has ended; they start when the jobs `after` have ended well."""
        job_name = f"{self.campaign.name}-{self.name}"
        if not self.is_gang:
            return self.work.submit(self.cluster, job_name, live=live, after=after)
        if alive := [job for job in read_jobs(self.folder) if job in live]:
            return alive
        run = self.begin_run()
        job: str = submit_gang(self.run[0], run, name=job_name, after=after).job_id
        add_job(self.folder, job)
        return [job]

    def run_here(self) -> bool:
        """The stage on this machine; whether it ended well."""
        if not self.is_gang:
            self.work.run_here()
            say(f"{self.name}: {self.work.describe()}")
            return self.work.is_done
        run = self.begin_run()
        command = [sys.executable, "-m", "megadistill", "train", str(run.path)]
        return subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode == 0

    def state(self, live: Mapping[str, str]) -> StageState:
        if not self.is_gang:
            return replace(self.work.state(live), verb=self.config.verb)
        config, run = self.run
        ends = [read_json(file) for file in run.path.glob("control/attempt-*/ended.json")]
        failed = [end["message"] for end in ends if end and end["status"] == "failed"]
        jobs = list(read_jobs(self.folder))
        return StageState(
            name=self.name,
            verb=self.config.verb,
            status=status_of(jobs, live, done=self.is_done, failed=bool(failed)),
            job=jobs[-1] if jobs else "",
            progress=f"step {run.read_progress().get('step', 0)} of {config.steps}",
            detail="" if self.is_done else "".join(failed[-1:]),
        )


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
    stages: dict[str, Stage]
    """In an order in which each comes after those it needs."""

    @classmethod
    def of(cls, config: CampaignConfig) -> "Campaign":
        root = (Path(config.runs_dir) / config.name).absolute()
        stages: dict[str, Stage] = {}
        for name in config.ordered():
            stage = config.stages[name]
            needs = [stages[need] for need in stage.needs]
            stages[name] = Stage(name=name, config=stage, root=root, campaign=config, needs=needs)
        return cls(config=config, stages=stages)

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> "Campaign":
        """From a configuration file, or from a campaign's directory."""
        path = Path(source)
        file = path / "campaign.yaml" if path.is_dir() else path
        if path.is_dir() and not file.exists():
            raise ValueError(f"{path}: found no campaign.yaml, expected a campaign's directory")
        return cls.of(load(CampaignConfig, file, overrides))

    @property
    def root(self) -> Path:
        return (Path(self.config.runs_dir) / self.config.name).absolute()

    def commands(self) -> dict[str, list[list[str]]]:
        """Every stage's command lines, to be checked before anything is submitted."""
        return {
            name: [["train", str(stage.config.config), *stage.config.args]]
            if stage.is_gang
            else [list(shard.arguments.words) for shard in stage.work.shards]
            for name, stage in self.stages.items()
        }

    def begin(self) -> None:
        """Make the directory (mode 0700) and keep the configurations there."""
        check_root("runs_dir", self.root)
        for stage in self.stages.values():
            assert stage.digest, "problems of any stage come up before anything is written"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("configs", "stages"):
            (self.root / name).mkdir(mode=0o700, exist_ok=True)
        for stage in self.stages.values():
            stage.folder.mkdir(mode=0o700, exist_ok=True)
            stage.keep_config()
        write_atomic(self.root / "campaign.yaml", dump(self.config))

    def submit(self) -> dict[str, list[str]]:
        """Submit what is neither done nor in the queue; the jobs of each stage that is to run."""
        self.begin()
        jobs: dict[str, list[str]] = {}
        live = live_jobs()
        for name, stage in self.stages.items():
            if not stage.is_done:
                after = [job for need in stage.needs for job in jobs.get(need.name, ())]
                jobs[name] = stage.submit(live, after)
        return jobs

    def run_here(self) -> bool:
        """The stages one after the other on this machine, without Slurm; whether all ended well.

        A stage that fails keeps those from running that need it, and no others.
        """
        self.begin()
        done: set[str] = set()
        for name, stage in self.stages.items():
            missing = [need.name for need in stage.needs if need.name not in done]
            if missing:
                say(f"{name}: not run, it needs {', '.join(missing)}")
            elif stage.is_done or stage.run_here():
                done.add(name)
                say(f"{name}: done")
            else:
                say(f"{name}: failed")
        return len(done) == len(self.stages)

    @property
    def folders(self) -> list[Path]:
        return [stage.folder for stage in self.stages.values()]

    def status(self) -> list[StageState]:
        """The state of every stage."""
        live = jobs_in_queue(self.folders)
        return [stage.state(live) for stage in self.stages.values()]

    def cancel(self) -> list[str]:
        """Cancel what is in the queue, last stages first; the jobs' numbers."""
        return cancel(self.folders)
