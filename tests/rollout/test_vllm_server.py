"""The engine's process, as far as it goes without vLLM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.rollout import wire
from megadistill.rollout.vllm_arguments import vllm_environment
from megadistill.rollout.vllm_server import listen_address, start_engine
from megadistill.rundir import RunDir
from tests.rollout.fakes import wait_until
from tests.tiny import make_config, sft_tree


def make_run(directory: Path) -> RunDir:
    config = make_config(sft_tree(runs_dir=str(directory)))
    run = RunDir.of(config)
    run.create(config)
    return run


def test_a_failed_start_is_announced_and_ends_the_process(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    command = [sys.executable, "-m", "megadistill.rollout.vllm_server", str(run.path)]
    ended = subprocess.run([*command, "--index", "3"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "rollout: missing, kind sft needs no engine" in ended.stderr
    announced = wire.EngineAddress.model_validate_json(run.engine_file(3).read_bytes())
    assert announced.error == "ValueError: rollout: missing, kind sft needs no engine"
    assert announced.port == 0


def test_a_process_follows_its_parent_into_death(tmp_path: Path) -> None:
    child = (
        "import time; from megadistill.rollout import vllm_server as s; s.PARENT_POLL_S = 0.05;"
        "s.follow_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    parent += f"; open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    pid = int((tmp_path / "pid").read_text())
    assert is_running(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not is_running(pid))
    process.stdout.close()


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie; a container's first process may leave those."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_machine_listens_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEGADISTILL_HOST", "SLURM_JOB_NUM_NODES", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    assert listen_address(make_config()) == "127.0.0.1"
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    assert listen_address(make_config()) == "127.0.0.1"
    monkeypatch.setenv("MEGADISTILL_HOST", "10.1.2.3")
    assert listen_address(make_config()) == "10.1.2.3"


def test_a_run_without_rollouts_has_no_engine() -> None:
    with pytest.raises(ValueError, match="rollout: missing"):
        start_engine(make_config(sft_tree()), 0)


def test_only_a_cpu_pins_threads_and_switches_compilation_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    cpu, gpu = vllm_environment(3, gpu=False), vllm_environment(3, gpu=True)
    assert (cpu["OMP_NUM_THREADS"], cpu["TORCHDYNAMO_DISABLE"]) == ("3", "1")
    assert cpu["OMP_WAIT_POLICY"] == "PASSIVE"
    assert not {"OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"} & gpu.keys()
    assert gpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
