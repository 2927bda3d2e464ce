"""What nodes tell each other, and what node 0 makes of it, without processes."""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megadistill.launch.heartbeats import (
    AttemptOutcome,
    Failure,
    Heartbeat,
    Heartbeats,
    await_launch,
    launch_file,
    sole_owner,
)
from megadistill.launch.layout import layout
from megadistill.launch.node import begin_launch, check_restarts
from megadistill.launch.node_context import (
    NodeContext,
    local_context,
    own_job,
    rendezvous_port,
    requeue,
    slurm_context,
)
from megadistill.launch.supervisor import Follower, Leader, Timeouts
from megadistill.rundir import RunDir
from tests.launch.configs import make_config
from tests.launch.test_submit import make_command

QUICK = Timeouts(silence_s=0.3, start_s=0.3, settle_s=0.1, grace_s=0.1, drain_s=0.2, stop_s=0.2)
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "41",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_RESTART_COUNT": "3",
    "MEGADISTILL_LAUNCH": "77",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    config = make_config(runs_dir=str(tmp_path))
    run = RunDir.of(config)
    run.create(config)
    return run


def context(node: int, launch_id: str = "now") -> NodeContext:
    return NodeContext(node=node, num_nodes=2, hosts=("alpha", "beta"), launch_id=launch_id)


@dataclass
class Attempt:
    """Node 0's referee and node 1's board of one attempt with a trainer on each."""

    referee: Leader
    mine: Heartbeats
    theirs: Heartbeats

    def until(self, own: Heartbeat, patience_s: float = 3.0) -> AttemptOutcome:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if end := self.referee.outcome(own):
                return end
            time.sleep(0.02)
        raise AssertionError("no verdict")


@pytest.fixture
def attempt(run: RunDir, tmp_path: Path) -> Attempt:
    mine, theirs = Heartbeats(directory=tmp_path, node=0), Heartbeats(directory=tmp_path, node=1)
    plan = layout(make_config(parallel={"dp": 2}), 2, 0)
    referee = Leader(run=run, plan=plan, context=context(0), heartbeats=mine, timeouts=QUICK)
    return Attempt(referee, mine, theirs)


def failure(node: int, what: str, when: float) -> Failure:
    return Failure(node=node, what=what, when=when)


def test_place_comes_from_slurms_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_command(tmp_path, "scontrol", 'echo "$3" >"$0.asked"; printf "n1\\nn2\\n"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = slurm_context(SLURM)
    assert (tmp_path / "scontrol.asked").read_text() == "n[1-2]\n"
    assert found == NodeContext(
        node=1, num_nodes=2, hosts=("n1", "n2"), launch_id="41-3-0-77", job_id="41", restarts=3
    )
    assert found.host == "n2"


HETEROGENEOUS = {
    **SLURM,
    "SLURM_NODEID": "2",
    "SLURM_NNODES": "3",
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST": "a1,z[1-2]",
    "SLURM_STEP_NODELIST": "a1,z[1-2]",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "z[1-2]",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "a1",
}


def test_a_heterogeneous_jobs_nodes_come_in_the_order_of_its_components(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = 'case "$3" in a1) echo a1;; "z[1-2]") printf "z1\\nz2\\n";; *) exit 1;; esac'
    make_command(tmp_path, "scontrol", body)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = slurm_context(HETEROGENEOUS)
    assert found.hosts == ("z1", "z2", "a1")
    assert (found.host, found.second_component) == ("a1", 1)
    with pytest.raises(ValueError, match=r"srun --het-group=0,1"):
        slurm_context({**HETEROGENEOUS, "SLURM_NNODES": "2"})
    with pytest.raises(ValueError, match="SLURM_HET_SIZE: found 3 components, expected 2"):
        slurm_context({**HETEROGENEOUS, "SLURM_HET_SIZE": "3"})


def test_in_a_container_the_job_script_stands_in_for_scontrol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_NODELIST", SLURM["SLURM_JOB_NODELIST"])
    monkeypatch.setenv("MEGADISTILL_HOSTS", "n1,n2")
    assert slurm_context(SLURM).hosts == ("n1", "n2")
    assert requeue("41") == "found no scontrol here and no MEGADISTILL_REQUEUE from the job script"
    monkeypatch.setenv("MEGADISTILL_REQUEUE", str(tmp_path / "wanted"))
    assert requeue("41") is None
    assert (tmp_path / "wanted").exists()


def test_a_task_of_an_array_is_requeued_alone() -> None:
    assert own_job({"SLURM_JOB_ID": "41"}) == "41"
    array = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "7"}
    assert own_job({"SLURM_JOB_ID": "41", **array}) == "41_7"


def test_a_place_outside_srun_or_beside_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match="SLURM_STEP_ID: not set"):
        slurm_context({"SLURM_JOB_ID": "41"})
    with pytest.raises(ValueError, match="SLURM_LOCALID: found 1, expected one task a node"):
        slurm_context({**SLURM, "SLURM_LOCALID": "1"})


def test_rendezvous_ports_differ_by_job_and_attempt() -> None:
    first = replace(context(0), job_id="41")
    ports = {rendezvous_port(replace(first, job_id=job), n) for job in ("41", "42") for n in (0, 1)}
    assert len(ports) == 4
    assert all(20000 <= port < 30000 for port in ports)
    assert rendezvous_port(local_context(), 0) > 1024


PLAN = layout(make_config(parallel={"dp": 2}), 2, 0)


def test_the_other_nodes_find_the_launch_of_node_0_and_no_older_one(run: RunDir) -> None:
    old = begin_launch(run, context(0, "before"), PLAN)
    with pytest.raises(RuntimeError, match=r"node 1 \(beta\): waited 0 s for node 0 \(alph"):
        await_launch(run, context(1), timeout_s=0.2)
    launch = begin_launch(run, context(0), PLAN)
    assert await_launch(run, context(1), timeout_s=0.2) == launch
    assert (old.attempt, launch.attempt, launch.hosts) == (0, 1, ("alpha", "beta"))
    assert launch.roles == ("trainer 0 on CPU", "trainer 1 on CPU, engine 0 on CPU")
    noted = [json.loads(line) for line in (run.path / "state/attempts.jsonl").open()]
    assert [line["attempt"] for line in noted] == [0]
    assert json.loads(launch_file(run).read_text())["launch_id"] == "now"


def test_files_by_which_nodes_met_are_kept_while_one_may_still_read_them(run: RunDir) -> None:
    """A node may be about to read how its attempt ended, also when two have followed quickly."""
    for number in range(3):
        begin_launch(run, context(0, str(number)), PLAN)
    kept = [run.path / "control" / f"attempt-{number}" for number in range(4)]
    assert all(path.is_dir() for path in kept[:3])
    (kept[0] / "ended.json").touch()
    for number in (1, 2):
        os.utime(kept[number], (time.time() - 7200,) * 2)
    begin_launch(run, context(0, "after"), PLAN)
    assert [path.is_dir() for path in kept] == [True, False, True, True]


def test_a_run_has_one_owner_at_a_time(run: RunDir) -> None:
    begin_launch(run, context(0), PLAN)
    with (
        sole_owner(run, wait_s=0),
        pytest.raises(ValueError, match="found launch now at work on this run, expected none"),
        sole_owner(run, wait_s=0.1),
    ):
        pass
    with sole_owner(run, wait_s=0):
        pass


def test_a_restart_beyond_max_attempts_is_refused() -> None:
    config = make_config(cluster={"max_attempts": 2})
    check_restarts(config, replace(context(0), restarts=2))
    with pytest.raises(ValueError, match=r"cluster\.max_attempts: found restart 3 of job None"):
        check_restarts(config, replace(context(0), restarts=3))


def test_notices_and_verdicts_survive_the_way(tmp_path: Path) -> None:
    one, two = Heartbeats(directory=tmp_path, node=1), Heartbeats(directory=tmp_path, node=2)
    assert two.read(1) is None
    assert two.silent_s(1) is None
    said = Heartbeat(state="failed", stop="why", failure=failure(1, "x", 1.0))
    one.post(said, every_s=9)
    one.post(replace(one.heartbeat), every_s=9)  # nothing new, not yet due
    assert two.read(1) == replace(said, beat=1)
    end = AttemptOutcome(status="failed", message="m", failure=said.failure)
    one.declare_outcome(end)
    assert two.read_outcome() == end


def test_the_earliest_failure_of_all_nodes_is_the_cause(attempt: Attempt) -> None:
    own = Heartbeat(state="failed", failure=failure(0, "second", 20.0))
    assert attempt.referee.outcome(own) is None  # others may still be on their way
    attempt.theirs.post(Heartbeat(state="failed", failure=failure(1, "first", 10.0)), every_s=0)
    end = attempt.until(own)
    assert (end.status, end.message) == ("failed", "first")


def test_a_node_that_never_appears_is_given_up(attempt: Attempt) -> None:
    assert "node 1 (beta) has not appeared within 0 s" in attempt.until(Heartbeat()).message


def test_a_node_that_stops_changing_its_notice_is_given_up(attempt: Attempt) -> None:
    attempt.theirs.post(Heartbeat(), every_s=0)
    assert "node 1 (beta) has shown no sign of life" in attempt.until(Heartbeat()).message


def test_trainers_that_do_not_end_with_the_others_are_a_failure(
    run: RunDir, attempt: Attempt
) -> None:
    attempt.referee.timeouts = replace(QUICK, silence_s=60)
    attempt.theirs.post(Heartbeat(), every_s=0)
    end = attempt.until(Heartbeat(state="done"))
    assert end.message.startswith("node 1 (beta) has trainers that do not end")


def test_trainers_that_ignore_a_stop_request_are_a_failure(run: RunDir, attempt: Attempt) -> None:
    attempt.referee.timeouts = replace(QUICK, silence_s=60)
    attempt.theirs.post(Heartbeat(stop="SIGUSR1"), every_s=0)
    end = attempt.until(Heartbeat())
    assert end.message.startswith("node 0 (alpha) has trainers that have not ended 0 s after")
    assert run.stop_file.read_text() == "SIGUSR1"


def test_the_verdict_follows_the_progress_once_all_trainers_have_ended(
    run: RunDir, attempt: Attempt
) -> None:
    attempt.referee.timeouts = replace(QUICK, silence_s=60)
    done = Heartbeat(state="done")
    attempt.theirs.post(done, every_s=0)
    assert attempt.until(done).status == "failed"
    run.request_stop("why")
    run.write_progress({"step": 2, "steps": 3, "done": False})
    assert attempt.until(done) == AttemptOutcome(
        status="stopped", message="stopped at step 2 of 3 (why)"
    )
    run.write_progress({"step": 3, "steps": 3, "done": True})
    assert attempt.until(done).status == "done"


def test_a_member_gives_up_without_node_0(tmp_path: Path) -> None:
    heartbeats = Heartbeats(directory=tmp_path, node=1)
    member = Follower(context=context(1), heartbeats=heartbeats, timeouts=QUICK)
    assert member.outcome(Heartbeat()) is None
    time.sleep(QUICK.silence_s + 0.1)
    end = member.outcome(Heartbeat())
    assert end is not None
    assert end.message.startswith("node 0 (alpha) has shown no sign of life")
