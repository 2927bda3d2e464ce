import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.config import RunConfig, load
from megadistill.launch import gang, slurm, submit
from megadistill.launch.sbatch_options import sbatch_parameters
from megadistill.rundir import RunDir
from tests.launch.configs import make_config, write_config

ROOT = Path(__file__).parents[2]


def test_a_dry_run_shows_script_and_layout_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cluster = {
        "nodes": 4,
        "gpus_per_node": 8,
        "rollout_nodes": 2,
        "partition": "hopper",
        "account": "an account",
        "cpus_per_node": 96,
        "time_minutes": 90,
        "signal_seconds": 120,
        "setup": ["module load cuda"],
    }
    config = write_config(tmp_path, rollout={"engines": 16}, cluster=cluster)
    submitted = submit(config, ["parallel.tp=4"], dry_run=True)
    assert submitted.job_id is None
    assert submitted.log is None
    assert submitted.run_dir == tmp_path / "runs" / "launch"
    assert not submitted.run_dir.exists()
    lines = submitted.script.splitlines()
    for line in (
        "#SBATCH --job-name=launch",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=96",
        "#SBATCH --partition=hopper",
        "#SBATCH --account='an account'",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --open-mode=append",
        "#SBATCH --time=90",
        "module load cuda",
        "export SUBMITIT_PREEMPT_SIGNAL=USR1",
    ):
        assert line in lines
    assert not any("qos" in line or "wckey" in line for line in lines)
    assert "--kill-on-bad-exit=1" in next(line for line in lines if line.startswith("srun"))
    assert "16 trainer rank(s), 16 engine(s), 4 node(s)" in submitted.layout
    printed = capsys.readouterr().out
    assert submitted.script in printed
    assert submitted.layout in printed


def test_a_cpu_run_asks_for_no_gpu_and_may_share_its_node(tmp_path: Path) -> None:
    cluster = make_config(cluster={"exclusive": False}).cluster
    parameters = sbatch_parameters("run", cluster, tmp_path)
    executor = slurm.DryGangExecutor(tmp_path)
    executor.update_parameters(**parameters)
    script = executor.script()
    assert not any(word in script for word in ("gpus", "exclusive", "--mem"))


def test_what_cannot_be_submitted_is_refused_by_name(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with pytest.raises(ValueError, match="verb: found 'dance', expected 'train'"):
        submit(config, verb="dance", dry_run=True)
    with pytest.raises(ValueError, match=r"cluster\.qos: found 'a.nb', expected one line"):
        submit(config, ['cluster.qos="a\\nb"'], dry_run=True)
    with pytest.raises(
        ValueError, match=r"cluster\.rollout_nodes: found 2, expected less than the"
    ):
        submit(config, ["cluster.nodes=2", "cluster.rollout_nodes=2"], dry_run=True)


def test_launch_imports_without_torch() -> None:
    code = "import sys, megadistill.launch; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_task_ends_in_submitits_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    assert gang.leave_unless_done(0) == 0
    with pytest.raises(RuntimeError, match="exit code 1"):
        gang.leave_unless_done(1)
    with pytest.raises(SystemExit, match="75"):
        gang.leave_unless_done(75)


def make_command(directory: Path, name: str, body: str) -> None:
    (directory / name).write_text(f"#!/bin/bash\n{body}\n")
    (directory / name).chmod(0o755)


def test_a_users_output_settings_hide_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_command(tmp_path, "squeue", 'env >"$0.env"; echo "41 41 PENDING"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert slurm.live_jobs() == {"41": "PENDING"}
    seen = (tmp_path / "squeue.env").read_text()
    assert "SQUEUE" not in seen
    assert "SLURM_CONF=/etc/slurm.conf" in seen


def test_a_job_inherits_no_word_that_would_win_over_its_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        if name.startswith(("SBATCH_", "SLURM_", "SQUEUE_")):
            monkeypatch.delenv(name)
    hostile = {
        "SBATCH_EXPORT": "NONE",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_ARRAY_INX": "0-3",
        "SBATCH_NO_REQUEUE": "1",
        "SRUN_CPUS_PER_TASK": "9",
        "SQUEUE_FORMAT": "%i",
    }
    chosen = {"SBATCH_ACCOUNT": "me", "SBATCH_PARTITION": "short", "SLURM_CONF": "/slurm.conf"}
    for name, value in {**hostile, **chosen}.items():
        monkeypatch.setenv(name, value)
    with slurm.job_environment():
        left = {k: v for k, v in os.environ.items() if k.startswith(("SBATCH_", "SLURM_", "S"))}
        assert {k: v for k, v in left.items() if k in {**hostile, **chosen}} == chosen
    assert all(os.environ[name] == value for name, value in hostile.items())


def test_the_stand_in_for_sacct_is_used_only_where_sacct_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{tmp_path}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    make_command(tmp_path, "sacct", "exit 0")
    slurm.make_sacct_usable()
    assert os.environ["PATH"] == path
    make_command(tmp_path, "sacct", "echo accounting storage is disabled >&2; exit 1")
    make_command(tmp_path, "squeue", "exit 0")
    slurm.make_sacct_usable()
    assert os.environ["PATH"] == f"{slurm.NO_ACCOUNTING}:{path}"
    slurm.make_sacct_usable()
    assert os.environ["PATH"] == f"{slurm.NO_ACCOUNTING}:{path}"


def test_the_stand_in_answers_what_submitit_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = ["7|RUNNING|node1", "8_0|SIGNALING|n[1-2]", "8_1|REQUEUE_HOLD|", "17|FAILED|n1"]
    make_command(tmp_path, "squeue", f"printf '%s\\n' {' '.join(repr(line) for line in states)}")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command = [str(slurm.NO_ACCOUNTING / "sacct"), "-o", "JobID,State,NodeList", "--parsable2"]
    answer = subprocess.run(
        [*command, "-j", "7", "-j", "8"], check=True, capture_output=True, text=True
    )
    assert answer.stdout.splitlines() == [
        "JobID|State|NodeList",
        "7|RUNNING|node1",
        "8_0|RUNNING|n[1-2]",
        "8_1|PENDING|",
    ]
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "no accounting" in refused.stderr


def test_a_queued_run_is_submitted_from_its_own_directory(tmp_path: Path) -> None:
    config = make_config(runs_dir=str(tmp_path))
    run = RunDir.of(config)
    run.create(config)
    assert submit(run.path, dry_run=True).run_dir == run.path


def test_where_there_is_no_cluster_the_queue_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="squeue: no such program"):
        slurm.live_jobs()
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    with pytest.raises(ValueError, match=r"(?s)failed for 0 s: Unable to contact.*SLURM_CONF"):
        slurm.live_jobs(0.0)


REFUSED = "sbatch: error: invalid partition specified: nowhere"


def test_what_slurm_refuses_is_its_own_line_and_leaves_no_run(
    refusing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(refusing)
    with pytest.raises(slurm.SubmissionError) as raised:
        submit(config)
    assert str(raised.value) == REFUSED
    assert capsys.readouterr() == ("", "")
    assert not (refusing / "runs" / "launch").exists()
    begun = RunDir(refusing / "runs" / "launch")
    begun.create(load(RunConfig, config))
    with pytest.raises(ValueError, match="invalid partition"):
        submit(config)
    assert begun.config_file.exists()  # it was there before


CONFIG = "SLURM_VERSION           = 23.11.4\\nMaxArraySize            = {size}\\n"
ASSOCIATION = "    MaxJobs= MaxJobsAccrue= MaxSubmitJobs={limit} MaxWallPJ=\\n"


@pytest.mark.parametrize(
    ("size", "limits", "room"),
    [(1001, [""], 1000), (5, [""], 4), (1001, ["", "40(10)"], 15), (1001, ["9(9)"], 1), (0, [], 1)],
)
def test_how_many_tasks_an_array_may_have_is_asked_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, limits: list[str], room: int
) -> None:
    associations = "".join(ASSOCIATION.format(limit=limit) for limit in limits)
    make_command(
        tmp_path,
        "scontrol",
        f"case $2 in config) printf '{CONFIG.format(size=size)}';; "
        f"assoc_mgr) printf '{associations}';; esac",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.array_room() == room


def test_where_the_cluster_does_not_say_an_array_has_what_slurm_takes_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_command(tmp_path, "scontrol", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.array_room() == 1000


def test_a_queue_that_does_not_answer_is_said_at_once_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = f"echo >>{tmp_path}/asked; (( $(wc -l <{tmp_path}/asked) > 2 )) || exit 1"
    make_command(tmp_path, "squeue", f"{asked}; echo '41 41 PENDING'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "WAIT_POLL_S", 0.01)
    assert slurm.live_jobs() == {"41": "PENDING"}
    assert caplog.messages == ["squeue does not answer, it is asked for 600 s more"]
