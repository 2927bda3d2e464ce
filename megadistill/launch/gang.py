"""Submitting a run to Slurm: one job, one task a node, each a node process. And a run as a stage."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit

from megadistill.atomic import write_atomic
from megadistill.config import RunConfig
from megadistill.launch.heartbeats import create_run
from megadistill.launch.layout import describe, layout
from megadistill.launch.node import gpus_per_node, open_run, run_node
from megadistill.launch.node_context import slurm_context
from megadistill.launch.shared_files import read_json
from megadistill.launch.slurm import batch_executor, gone_if_refused, submit_task, wait_for
from megadistill.launch.stages import BEGUN, StageRecord, add_job, read_jobs
from megadistill.launch.stopping import DONE, STOPPED
from megadistill.rundir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job on its way, or what a dry run would submit."""

    job_id: str | None
    """Slurm's number; absent after a dry run."""
    run_dir: Path
    log: Path | None
    """Output of the job's first node; absent after a dry run."""
    script: str
    """The job script."""
    layout: str
    """Who runs what where, as a table."""


def node_task(run_dir: Path) -> int:
    """Every task of the job."""
    return leave_unless_done(run_node(run_dir, context=slurm_context()))


def submit(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    verb: str = "train",
    dry_run: bool = False,
    wait: bool = False,
) -> Submitted:
    """Submit a run as a Slurm job that requeues itself until the run is done.

        from megadistill.launch import submit
        submitted = submit("configs/camopd/medical.yaml", ["steps=40"])

    The resolved configuration is written to the run directory now; editing the file later does not
    change a queued job. `dry_run` prints the job script and the layout and submits nothing; it
    needs no Slurm. `wait` returns when the job has ended well and raises `RuntimeError` when not.
    Raises `ValueError` for a configuration that cannot run, or a run directory of another one.
    """
    if verb != "train":
        raise ValueError(f"verb: found {verb!r}, expected 'train'")
    config, run = open_run(config_path, overrides)
    plan = describe(layout(config, config.cluster.nodes, gpus_per_node(config)))
    script = batch_executor(config.name, config.cluster, run.path, check=not dry_run).script()
    if dry_run:
        sys.stdout.write(f"{script}\n{plan}\n")
        return Submitted(job_id=None, run_dir=run.path, log=None, script=script, layout=plan)
    job = submit_gang(config, run)
    if wait:
        wait_for(job)
    log = Path(job.task(0).paths.stdout)
    return Submitted(job_id=job.job_id, run_dir=run.path, log=log, script=script, layout=plan)


def submit_gang(
    config: RunConfig, run: RunDir, *, name: str | None = None, after: Sequence[str] = ()
) -> "submitit.Job[int]":
    """Submit a run as one job of `cluster.nodes` nodes, once the jobs `after` have ended well.

    Raises `ValueError` for a layout that cannot be, or a run directory of another run.
    """
    layout(config, config.cluster.nodes, gpus_per_node(config))
    dependency = f"afterok:{':'.join(after)}" if after else ""
    executor = batch_executor(name or config.name, config.cluster, run.path, dependency)
    with gone_if_refused(run.path, is_new=not run.path.exists()):
        create_run(run, config)
        return submit_task(executor, node_task, run.path)


def leave_unless_done(code: int) -> int:
    """End the task in submitit's terms: a result, an error, or, to be resumed, neither."""
    if code == STOPPED:
        # A result on disk would make submitit take the requeued job for a finished one.
        sys.stdout.flush()
        os._exit(code)
    if code != DONE:
        raise RuntimeError(f"the attempt failed (exit code {code}); the log above names the cause")
    return code


@dataclass(frozen=True, kw_only=True)
class Gang:
    """A stage that is one run, whose directory is elsewhere."""

    name: str
    root: Path
    """Holds what was submitted."""
    needs: Sequence[str]
    config: RunConfig
    run: RunDir
    digest: str
    """Identifies the run and all that it depends on."""
    job_name: str

    @property
    def is_done(self) -> bool:
        return self.record.state({}).status == "done"

    @property
    def is_stale(self) -> bool:
        """Whether the run was begun when what it depends on was something else."""
        begun = read_json(self.root / BEGUN)
        return self.run.config_file.exists() and begun not in (None, {"digest": self.digest})

    def begin(self) -> None:
        """Write the run's directory; `ValueError` when it holds another run."""
        if self.is_stale:
            raise ValueError(
                f"stages.{self.name}: {self.run.path} holds a run that was made from other inputs; "
                "change its `name`, or delete that directory"
            )
        create_run(self.run, self.config)
        write_atomic(self.root / BEGUN, json.dumps({"digest": self.digest}))

    def submit(
        self, live: Mapping[str, str], after: Sequence[str] = (), *, afresh: bool = True
    ) -> list[str]:
        """The job after which it has ended."""
        if alive := [job for job in read_jobs(self.root) if job in live]:
            return alive
        self.begin()
        job: str = submit_gang(self.config, self.run, name=self.job_name, after=after).job_id
        add_job(self.root, job)
        return [job]

    def run_here(self) -> None:
        """The run on this machine."""
        self.begin()
        command = [sys.executable, "-m", "megadistill", "train", str(self.run.path)]
        subprocess.run(command, check=False, stdin=subprocess.DEVNULL)

    @property
    def record(self) -> StageRecord:
        return StageRecord(
            name=self.name,
            root=self.root,
            verb="train",
            run=self.run.path,
            digest=self.digest,
            steps=self.config.steps,
        )

    def describe(self) -> str:
        """How far it is."""
        return self.record.state({}).progress
