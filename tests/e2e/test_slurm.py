"""Whole jobs on a real Slurm of four nodes that this module starts; the roles are fakes."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megadistill.launch import slurm
from megadistill.launch.node import open_run
from megadistill.rundir import RunDir
from tests.e2e.local_slurm import (
    ROOT,
    Cluster,
    local_cluster,
    wait_until,
)
from tests.launch.configs import write_config
from tests.launch.fake_node import fake_task

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    python = tmp_path_factory.mktemp("site") / "python"
    # Stands where the job script expects python: -u -m megadistill node CONFIG becomes a fake node.
    python.write_text(
        f"#!/bin/bash\ncd {shlex.quote(str(ROOT))}\n"
        f'exec {shlex.quote(sys.executable)} -u -m tests.launch.fake_node "$5"\n'
    )
    python.chmod(0o755)
    with local_cluster(MEGADISTILL_PYTHON=str(python)) as started:
        yield started


@dataclass
class Job:
    """A run of fakes in `directory`, submitted with the job script as it is shipped."""

    cluster: Cluster
    directory: Path
    id: str = ""

    @property
    def run(self) -> RunDir:
        return RunDir(self.directory / "runs" / "launch")

    @property
    def log(self) -> str:
        return next(self.directory.glob("*.log")).read_text()

    def configure(self, **changed: Any) -> Path:
        return write_config(self.directory, parallel={"dp": 2}, **changed)

    def play(self, role: str, part: str) -> None:
        (self.run.path / "parts").mkdir(parents=True, exist_ok=True)
        (self.run.path / "parts" / role).write_text(part)

    def sbatch(self, **changed: Any) -> None:
        script = str(ROOT / "slurm" / "camopd_medical.sh")
        config = str(self.configure(**changed))
        self.id = self.cluster.call("sbatch", "--parsable", script, config, cwd=self.directory)

    def reach(self, step: int) -> None:
        wait_until(
            lambda: self.run.read_progress().get("step", 0) >= step,
            lambda: self.cluster.call("squeue", "--states=all", "--long"),
        )

    def check_steps(self) -> None:
        """No step was taken twice, none left out, over all attempts."""
        logs = sorted((self.run.path / "logs").glob("trainer-0.*.log"))
        text = "".join(log.read_text() for log in logs)
        steps = [int(line.split()[1]) for line in text.splitlines() if line.startswith("step ")]
        assert steps == list(range(1, len(steps) + 1))


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path) -> Iterator[Job]:
    job = Job(cluster, tmp_path)
    yield job
    if job.id:
        cluster.call("scancel", "--quiet", job.id)


def test_the_job_script_runs_a_cpu_config_on_gpu_nodes(job: Job) -> None:
    job.play("trainer-0", "work 3 trainer-1 engine-0")
    job.sbatch()
    job.cluster.wait_for_state(job.id, "COMPLETED", "FAILED")
    assert job.cluster.state(job.id) == "COMPLETED", job.log
    assert "step 3" in job.log
    seen = (job.run.path / "logs" / "seen-trainer-1.0.json").read_text()
    assert '"MASTER_ADDR": "node1"' in seen
    assert '"MEGADISTILL_HOST": "node2"' in seen
    assert '"CUDA_VISIBLE_DEVICES": ""' in seen
    assert (
        '"MEGADISTILL_HOST": "node4"'
        in (job.run.path / "logs" / "seen-engine-0.0.json").read_text()
    )


def test_a_warning_signal_saves_and_requeues_until_max_attempts(job: Job) -> None:
    job.play("trainer-0", "work 1000")
    job.sbatch(cluster={"max_attempts": 1})
    job.reach(2)
    job.cluster.call("scancel", "--signal=USR1", job.id)
    wait_until(lambda: "is requeued" in job.log)
    assert "saved" in job.log
    step = job.run.read_progress()["step"]
    job.reach(step + 1)
    job.cluster.call("scancel", "--signal=USR1", job.id)
    job.cluster.wait_for_state(job.id, "FAILED")
    assert "cluster.max_attempts 1 is reached" in job.log
    job.check_steps()


def test_the_same_crash_at_the_same_step_ends_the_job_with_its_last_words(job: Job) -> None:
    job.play("trainer-0", "serve")  # takes no step
    job.play("engine-0", "crash 0.1 trainer-0")
    job.sbatch()
    job.cluster.wait_for_state(job.id, "FAILED")
    assert "engine-0 ended with exit code 3 on node 3 (node4)" in job.log
    assert "NoLuckError" in job.log
    assert "the same error at step 0 as in attempt 0; the run stops here" in job.log
    assert "attempt 2" not in job.log


def test_a_cancelled_job_stays_cancelled(job: Job) -> None:
    job.play("trainer-0", "work 1000")
    job.sbatch()
    job.reach(2)
    job.cluster.call("scancel", job.id)
    job.cluster.wait_for_state(job.id, "CANCELLED")
    time.sleep(2)  # a requeue would bring it back
    assert job.cluster.state(job.id) == "CANCELLED"


def test_a_heterogeneous_job_trains_on_its_first_component(job: Job) -> None:
    job.play("trainer-0", "work 1000")
    script, config = str(ROOT / "slurm" / "camopd_medical.sh"), str(job.configure())
    job.id = job.cluster.call(
        *("sbatch", "--parsable", "--nodes=2", "--nodelist=node[3-4]"),
        *(":", "--nodes=1", "--nodelist=node1", "--partition=high", script, config),
        cwd=job.directory,
    )
    job.reach(1)
    for role, host in (("trainer-0", 3), ("trainer-1", 4), ("engine-0", 1)):
        seen = (job.run.path / "logs" / f"seen-{role}.0.json").read_text()
        assert f'"MEGADISTILL_HOST": "node{host}"' in seen
    job.cluster.call("scancel", "--signal=USR1", job.id)
    wait_until(lambda: "is requeued" in job.log)
    job.play("trainer-0", f"work {job.run.read_progress()['step'] + 3}")
    wait_until(lambda: "attempt 1: done" in job.log, lambda: job.log)
    job.check_steps()


def test_a_submitit_job_requeues_and_returns(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in job.cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # submission may put a stand-in on it
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(slurm, "WAIT_POLL_S", 0.2)
    config, run = open_run(job.configure(cluster={"nodes": 2, "signal_seconds": 60}), ())
    run.create(config)
    job.play("trainer-0", "work 1000")
    executor = slurm.batch_executor(config.name, config.cluster, run.path)
    submitted = slurm.submit_task(executor, fake_task, run.path)
    job.id = submitted.job_id
    job.reach(2)
    job.cluster.call("scancel", "--signal=USR1", job.id)
    wait_until(lambda: job.cluster.state(job.id) == "PENDING")
    job.play("trainer-0", f"work {run.read_progress()['step'] + 2}")
    slurm.wait_for(submitted)
    assert submitted.results() == [0, 0]
    job.check_steps()


def test_sbatch_accepts_the_job_scripts(cluster: Cluster) -> None:
    for script in ("camopd_medical.sh", "camopd_roleplay.sh"):
        cluster.call("sbatch", "--test-only", str(ROOT / "slurm" / script))
