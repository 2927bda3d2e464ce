"""Jobs of Slurm through submitit, and what its queue says of them."""

import getpass
import io
import logging
import os
import re
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from megadistill import recipes
from megadistill.config.cluster import ClusterConfig
from megadistill.launch.node_context import OUTPUT_SETTINGS, ask_slurm
from megadistill.launch.sbatch_options import python_words, sbatch_parameters

log = logging.getLogger(__name__)

NO_ACCOUNTING = recipes.FOLDER / "slurm" / "no_accounting"
"""Holds the stand-in for sacct."""
NOT_A_JOBS = (
    "SLURM_",
    "SLURMD_",
    "SRUN_",
    "SBATCH_",
    "MEGADISTILL_LAUNCH",
    "MEGADISTILL_SHARD",
    "CUDA_VISIBLE",
)
"""Beginnings of variables that a job must not inherit from where it is submitted."""
SBATCH_CHOICES = ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION")
"""By these a user chooses for all jobs where they run and who pays; they win over `cluster`."""
JOBS = "jobs.json"
"""Notes in a stage's directory which jobs were submitted for it."""
USUAL_ARRAY_SIZE = 1001
"""MaxArraySize, unless a site changed it."""
WAIT_POLL_S = 5.0
SQUEUE_PATIENCE_S = 600.0
"""A controller may be restarting; after that long without an answer it is an error."""


class SubmissionError(ValueError):
    """Slurm has not taken a job."""


class SlurmSilentError(ValueError):
    """Slurm's queue does not answer."""


class GangExecutor(submitit.SlurmExecutor):  # type: ignore[misc]  # submitit is not checked here
    """submitit's executor, which also shows its job script without submitting it."""

    def script(self) -> str:
        text: str = self._make_submission_file_text(self._submitit_command_str, uid="script")
        return text


class DryGangExecutor(GangExecutor):
    """Works where there is no Slurm; it never submits."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def batch_executor(
    name: str,
    cluster: ClusterConfig,
    root: Path,
    dependency: str = "",
    *,
    check: bool = True,
) -> GangExecutor:
    """An executor set up as the configuration asks; its files are in a fresh folder of `root`.

    `dependency` says in Slurm's words after which jobs it starts; where that cannot be any more, it
    is cancelled.
    """
    if not str(root).isprintable() or "%" in str(root):
        raise ValueError(
            f"runs_dir: found {str(root)!r}, expected printable text without %, which Slurm fills in"
        )
    folder = root / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    python = shlex.join(python_words(cluster))
    executor = (GangExecutor if check else DryGangExecutor)(folder, python=python)
    executor.update_parameters(**sbatch_parameters(name, cluster, folder, dependency))
    return executor


def submit_task(
    executor: GangExecutor, function: Callable[..., int], *arguments: Any
) -> "submitit.Job[int]":
    """Submit a call (any: it is pickled) to be made once on every node."""
    with submission():
        return executor.submit(function, *arguments)


@contextmanager
def submission() -> Iterator[None]:
    """Inside it submitit submits; `SubmissionError`, with Slurm's own words, when it does not take a job."""
    make_sacct_usable()
    with job_environment(), redirect_stderr(io.StringIO()):  # submitit says there what it raises
        try:
            yield
        except FailedJobError as error:
            raise SubmissionError(str(error)) from None


@contextmanager
def gone_if_refused(root: Path, *, is_new: bool) -> Iterator[None]:
    """Where Slurm takes no job of what is submitted inside, a new directory is deleted again."""
    try:
        yield
    except SubmissionError:
        if is_new and root.exists() and not any(root.rglob(JOBS)):
            shutil.rmtree(root)
        raise


@contextmanager
def job_environment() -> Iterator[None]:
    """What sbatch, and with it a new job, shall see of this process's environment.

    Nothing of the job it runs in: sbatch hands the whole environment on, and a SLURM_CPUS_PER_TASK
    of this job would bind that one. And nothing that would win over the job script (SBATCH_TIMELIMIT,
    SBATCH_ARRAY_INX, SBATCH_EXPORT=NONE ...), but for `SBATCH_CHOICES`.
    """
    own = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith((*NOT_A_JOBS, *OUTPUT_SETTINGS))
        and name not in ("SLURM_CONF", *SBATCH_CHOICES)
    }
    try:
        yield
    finally:
        os.environ.update(own)


def wait_for(job: "submitit.Job[int]") -> None:
    """Until the job has left the queue for good; `RuntimeError` unless it completed."""
    while job.job_id in live_jobs():
        time.sleep(WAIT_POLL_S)
    job.watcher.clear()
    job.watcher.register_job(job.job_id)
    state = job.watcher.get_state(job.job_id, mode="force")
    if state != "COMPLETED":
        raise RuntimeError(
            f"job {job.job_id}: found state {state}, expected COMPLETED; "
            f"see {job.task(0).paths.stdout}"
        )


def live_jobs(patience_s: float = SQUEUE_PATIENCE_S) -> dict[str, str]:
    """Job number -> state of our jobs in the queue; an array has its number once, whatever is left.

    Patient with a controller that does not answer. Raises `SlurmSilentError` in the end.
    """
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A %F %T"]
    deadline, waited = time.monotonic() + patience_s, False
    while True:
        try:
            answer = ask_slurm(command)
            break
        except FileNotFoundError:
            raise SlurmSilentError(
                "squeue: no such program, expected a machine of the cluster"
            ) from None
        except subprocess.SubprocessError as error:
            if time.monotonic() > deadline:
                said = str(getattr(error, "stderr", None) or error).strip()
                raise SlurmSilentError(
                    f"squeue has failed for {patience_s:.0f} s: {said}\n"
                    "  expected a machine of the cluster, or SLURM_CONF to name its file"
                ) from error
            if not waited:
                log.warning("squeue does not answer, it is asked for %.0f s more", patience_s)
            waited = True
            time.sleep(min(WAIT_POLL_S, 1.0))
    found: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        job, array, state = line.split()
        running = state == "RUNNING" or found.get(array) == "RUNNING"
        found |= {job: state, array: "RUNNING" if running else state}
    return found


def array_room() -> int:
    """Tasks that an array may have now; more shards share.

    That is MaxArraySize, and of what MaxSubmitJobs leaves half: other stages follow.
    """
    size = int(slurm_settings().get("MaxArraySize", USUAL_ARRAY_SIZE)) - 1
    left = [(most - now) // 2 for most, now in submit_limits()]
    return max(1, min([size, *left]))


def slurm_settings() -> dict[str, str]:
    """Slurm's own configuration; empty where the controller does not answer."""
    found = re.findall(
        r"^(\w+)\s*= (.*?)\s*$", answer_of(["scontrol", "show", "config"]), re.MULTILINE
    )
    return dict(found)


def submit_limits() -> list[tuple[int, int]]:
    """MaxSubmitJobs of this user's associations that have one, and how many jobs there are now."""
    words = ["scontrol", "show", "assoc_mgr", "flags=assoc", f"users={getpass.getuser()}"]
    found = re.findall(r"\bMaxSubmitJobs=(\d+)\((\d+)\)", answer_of(words))
    return [(int(most), int(now)) for most, now in found]


def answer_of(command: Sequence[str]) -> str:
    """What one of Slurm's commands says; nothing when it fails."""
    try:
        return ask_slurm(command).stdout
    except (FileNotFoundError, subprocess.SubprocessError):
        return ""


def make_sacct_usable() -> None:
    """Where accounting is off, put our stand-in for sacct first on PATH; submitit calls it."""
    command = ["sacct", "--noheader", "--parsable2", "--format=JobID", "--jobs=1"]
    try:
        ask_slurm(command)
    except (FileNotFoundError, subprocess.CalledProcessError):
        os.environ["PATH"] = f"{NO_ACCOUNTING}{os.pathsep}{os.environ['PATH']}"
