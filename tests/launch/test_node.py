"""The node process with fake roles: real processes, real signals, no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megadistill.config import RunConfig, load
from megadistill.launch.heartbeats import create_run
from megadistill.rundir import RunDir
from tests.launch.configs import write_config

PATIENCE_S = 100.0
ROOT = Path(__file__).parents[2]


class Job:
    """Fake nodes of one run, started by the test and ended with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = RunDir(directory / "runs" / "launch")
        self.nodes: list[subprocess.Popen[str]] = []

    def configure(self, **changed: Any) -> None:
        self.config = write_config(self.directory, **changed)

    def play(self, role: str, part: str) -> None:
        (self.run.path / "parts").mkdir(parents=True, exist_ok=True)
        (self.run.path / "parts" / role).write_text(part)

    def start(self, num_nodes: int = 1, **environment: str) -> None:
        for node in range(num_nodes):
            context = [str(node), str(num_nodes)] if num_nodes > 1 else []
            self.nodes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.launch.fake_node", str(self.config), *context],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=ROOT,
                    env={**os.environ, **environment},
                )
            )

    def finish(self, node: int = 0) -> tuple[int, str]:
        output, _ = self.nodes[node].communicate(timeout=PATIENCE_S)
        return self.nodes[node].returncode, output

    def seen(self, role: str, attempt: int = 0) -> dict[str, str | None]:
        """What the fake role found in its environment, once it runs."""
        file = self.run.path / "logs" / f"seen-{role}.{attempt}.json"
        wait_until(file.exists)
        values: dict[str, str | None] = json.loads(file.read_text())
        return values

    def pid(self, role: str) -> int:
        return int(str(self.seen(role)["pid"]))


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Zombies, which a container's init may leave, are dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    for node in job.nodes:
        if node.poll() is None:
            node.send_signal(signal.SIGCONT)
            node.kill()
        node.communicate()


def test_a_run_ends_when_its_trainers_are_done(job: Job) -> None:
    job.configure(parallel={"dp": 2, "threads": 3}, rollout={"engines": 2, "threads": 5})
    job.play("trainer-0", "work 3 trainer-1 engine-0 engine-1")
    job.start(CUDA_VISIBLE_DEVICES="0,1")
    code, output = job.finish()
    assert code == 0, output
    assert "step 3" in output  # rank 0's log is copied
    assert "trainer-1 plays" not in output
    assert "done, step 3 of 3" in output
    assert "trainer-1 plays work" in job.run.log_file("trainer-1", 0).read_text()
    first, second, engine = job.seen("trainer-0"), job.seen("trainer-1"), job.seen("engine-1")
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert (second["LOCAL_RANK"], second["LOCAL_WORLD_SIZE"], second["WORLD_SIZE"]) == (
        "1",
        "2",
        "2",
    )
    assert first["MASTER_ADDR"] == engine["MEGADISTILL_HOST"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"] is not None
    assert engine["RANK"] is engine["MASTER_PORT"] is None
    assert (first["OMP_NUM_THREADS"], engine["OMP_NUM_THREADS"]) == ("3", "5")
    assert first["CUDA_VISIBLE_DEVICES"] == engine["CUDA_VISIBLE_DEVICES"] == ""
    assert not is_alive(job.pid("engine-0"))


def test_gpu_roles_see_their_share_of_the_gpus_on_offer(job: Job) -> None:
    job.configure(
        rollout={"engines": 1, "tp": 2, "placement": "split"}, cluster={"gpus_per_node": 4}
    )
    job.play("trainer-0", "work 3 trainer-1 engine-0")
    job.start(CUDA_VISIBLE_DEVICES="3,4,5,6")
    assert job.finish()[0] == 0
    assert job.seen("trainer-1")["CUDA_VISIBLE_DEVICES"] == "3,4"
    assert job.seen("trainer-1")["LOCAL_RANK"] == "1"
    assert job.seen("engine-0")["CUDA_VISIBLE_DEVICES"] == "5,6"


def test_too_few_gpus_on_offer_are_refused_by_key(job: Job) -> None:
    job.configure(rollout={"placement": "colocated"}, cluster={"gpus_per_node": 4})
    job.start(CUDA_VISIBLE_DEVICES="3,4")
    code, output = job.finish()
    assert code == 1
    assert "cluster.gpus_per_node: found a role on GPU 3, but this node offers the job 2" in output


def test_a_crash_names_the_culprit_and_ends_the_others(job: Job) -> None:
    job.configure(parallel={"dp": 2})
    job.play("trainer-0", "work 1000")
    job.play("engine-0", "crash 0.2 trainer-0 trainer-1")
    job.start()
    code, output = job.finish()
    assert code == 1
    assert "engine-0 ended with exit code 3 on node 0" in output
    assert "engine-0: NoLuckError: out of luck" in output
    assert not any(is_alive(job.pid(role)) for role in ("trainer-0", "trainer-1", "engine-0"))


def test_a_users_mistake_is_told_in_its_own_words_alone(job: Job) -> None:
    job.configure()
    job.play("trainer-0", "blame 0")
    job.start()
    code, output = job.finish()
    assert code == 1
    said = "trainer-0 ended with exit code 2 on node 0 (127.0.0.1): data.pools: found none\n"
    assert f"attempt 0: {said}  expected one\n" in output
    assert "last lines" not in output


def test_a_role_killed_by_a_signal_is_a_failure(job: Job) -> None:
    job.configure()
    job.play("trainer-0", "die 0.2")
    job.start()
    code, output = job.finish()
    assert code == 1
    assert "trainer-0 was killed by SIGKILL" in output


def test_trainers_that_leave_before_the_end_are_a_failure(job: Job) -> None:
    job.configure()
    job.play("trainer-0", "work 0")
    job.start()
    code, output = job.finish()
    assert code == 1
    assert "ended with exit code 0 at step 0 of ?, expected the run to be done" in output


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_has_the_run_saved_and_is_no_failure(job: Job, number: signal.Signals) -> None:
    job.configure()
    job.play("trainer-0", "work 1000")
    job.start()
    wait_until(lambda: job.run.read_progress().get("step", 0) >= 2)
    for role in ("trainer-0", "engine-0"):  # Slurm signals every process of the step
        if number != signal.SIGINT:
            os.kill(job.pid(role), number)
    job.nodes[0].send_signal(number)
    code, output = job.finish()
    assert code == 75, output
    assert "saved" in output
    assert f"megadistill train {job.run.path}" in output
    step = job.run.read_progress()["step"]

    job.play("trainer-0", f"work {step + 2}")
    job.nodes.clear()
    job.start()
    code, output = job.finish()
    assert code == 0, output
    assert "attempt 1" in output
    assert f"step {step + 1}" in output
    assert f"step {step}\n" not in output


def test_no_process_outlives_a_killed_node(job: Job) -> None:
    job.configure(parallel={"dp": 2})
    job.play("trainer-0", "work 1000")
    job.play("engine-0", "stubborn")
    job.start()
    pids = [job.pid(role) for role in ("trainer-0", "trainer-1", "engine-0")]
    child = job.run.path / "logs" / "child-engine-0.json"
    wait_until(child.exists)
    pids.append(json.loads(child.read_text())["pid"])
    assert all(is_alive(pid) for pid in pids)
    job.nodes[0].kill()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_stubborn_engine_and_its_child_are_killed_at_the_end(job: Job) -> None:
    job.configure()
    job.play("engine-0", "stubborn")
    job.play("trainer-0", "work 5 engine-0")
    job.start()
    child = job.run.path / "logs" / "child-engine-0.json"
    wait_until(child.exists)
    assert job.finish()[0] == 0
    assert not is_alive(json.loads(child.read_text())["pid"])
    assert not is_alive(job.pid("engine-0"))


def test_nodes_end_together_when_the_run_is_done(job: Job) -> None:
    job.configure(parallel={"dp": 2})
    job.play("trainer-0", "work 3 trainer-1 engine-0")
    job.start(num_nodes=4)  # trainers on 0 and 1, nothing on 2, the engine on 3
    results = [job.finish(node) for node in range(4)]
    assert [code for code, _ in results] == [0, 0, 0, 0], results
    assert job.seen("trainer-1")["LOCAL_RANK"] == "0"
    assert job.seen("trainer-1")["MASTER_PORT"] == job.seen("trainer-0")["MASTER_PORT"]


def test_a_crash_on_another_node_ends_all_and_node_0_tells_why(job: Job) -> None:
    job.configure(parallel={"dp": 2})
    job.play("trainer-0", "work 1000")
    job.play("trainer-1", "crash 0.2 trainer-0")
    job.start(num_nodes=3)
    results = [job.finish(node) for node in range(3)]
    assert [code for code, _ in results] == [1, 1, 1], results
    assert "trainer-1 ended with exit code 3 on node 1" in results[0][1]
    assert "NoLuckError" in results[0][1]
    assert "trainer-1 ended with exit code 3 on node 1" in results[2][1]


def test_a_signal_to_any_node_stops_the_run(job: Job) -> None:
    job.configure(parallel={"dp": 2})
    job.play("trainer-0", "work 1000")
    job.start(num_nodes=3)
    wait_until(lambda: job.run.read_progress().get("step", 0) >= 1)
    wait_until((job.run.path / "control" / "attempt-0" / "node-2.json").exists)
    job.nodes[2].send_signal(signal.SIGUSR1)
    results = [job.finish(node) for node in range(3)]
    assert [code for code, _ in results] == [75, 75, 75], results
    assert "SIGUSR1" in results[0][1]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_node_that_falls_silent_is_given_up(job: Job, silent: int) -> None:
    job.configure(parallel={"dp": 2})
    job.play("trainer-0", "work 1000")
    job.start(num_nodes=2, FAKE_SILENCE_S="4")
    pids = [job.pid("trainer-0"), job.pid("trainer-1")]
    job.nodes[silent].send_signal(signal.SIGSTOP)
    code, output = job.finish(1 - silent)
    assert code == 1
    assert f"node {silent} (127.0.0.1) has shown no sign of life for" in output
    job.nodes[silent].send_signal(signal.SIGCONT)
    assert job.finish(silent)[0] == 1
    assert not any(is_alive(pid) for pid in pids)


def test_two_jobs_cannot_work_on_one_run(job: Job) -> None:
    job.configure()
    job.play("trainer-0", "work 1000")
    job.start()
    job.seen("trainer-0")
    job.start()
    code, output = job.finish(1)
    assert code == 1
    assert "at work on this run, expected none" in output
    assert job.nodes[0].poll() is None


def test_a_start_that_is_refused_leaves_the_run_as_it_is(job: Job) -> None:
    job.configure()
    job.play("trainer-0", "work 1000")
    job.start()
    job.seen("trainer-0")
    before = job.run.config_file.read_text()
    job.configure(steps=99999)
    job.start()
    code, output = job.finish(1)
    assert code == 1
    assert "at work on this run, expected none" in output
    with pytest.raises(ValueError, match="at work on this run, expected none"):
        create_run(job.run, load(RunConfig, job.config))
    assert job.run.config_file.read_text() == before


def test_a_run_that_is_done_answers_at_once_and_goes_on_when_it_gets_more_steps(job: Job) -> None:
    job.configure(steps=2)
    job.play("trainer-0", "work 2")
    job.start()
    assert job.finish()[0] == 0
    job.start()
    code, output = job.finish(1)
    assert (code, output) == (0, f"[node 0] {job.run.path}: done, step 2 of 2\n")
    assert not (job.run.path / "logs" / "seen-trainer-0.1.json").exists()
    job.play("trainer-0", "work 4")
    job.configure(steps=4)
    job.start()
    code, output = job.finish(2)
    assert code == 0, output
    assert job.run.read_progress()["step"] == 4


def test_a_run_that_is_deleted_while_at_work_ends_with_one_line(job: Job) -> None:
    job.configure()
    job.play("trainer-0", "work 1000 engine-0")
    job.start()
    pids = [job.pid("trainer-0"), job.pid("engine-0")]
    wait_until(lambda: job.run.read_progress().get("step", 0) >= 1)
    job.run.path.rename(job.directory / "gone")
    code, output = job.finish()
    assert code == 1
    assert output.endswith(f"ValueError: {job.run.path}: deleted while the run was at work\n")
    assert not any(is_alive(pid) for pid in pids)


def test_a_gone_terminal_does_not_keep_a_run_from_being_saved(job: Job) -> None:
    job.configure()
    job.play("trainer-0", "work 1000")
    terminal, other_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.fake_node", str(job.config)],
        stdout=other_end,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    os.close(other_end)
    wait_until(lambda: job.run.read_progress().get("step", 0) >= 2)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE_S) == 75
    assert "SIGHUP" in job.run.stop_file.read_text()
