"""What the run directory says of attempts, nodes and states."""

import json
import os
import time
from pathlib import Path

import pytest

from megadistill.launch import attempts
from megadistill.launch.attempt_log import LOST
from megadistill.launch.attempts import (
    last_error,
    last_writes,
    read_attempts,
    read_nodes,
    run_state,
)
from megadistill.launch.layout import layout
from megadistill.launch.node import begin_launch
from megadistill.launch.node_context import local_context
from megadistill.launch.on_export import read_evaluations
from megadistill.rundir import RunDir
from tests.report.runs import make_run, write_end
from tests.tiny import camopd_tree


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "tiny")


def begin(run: RunDir, attempt: int = 0, nodes: int = 1, launch: str = "local-1") -> None:
    """An attempt under way on some nodes."""
    directory = run.path / "control" / f"attempt-{attempt}"
    directory.mkdir()
    values = {"launch_id": launch, "attempt": attempt, "master_port": 1}
    values |= {"hosts": ["alpha"] * nodes, "roles": ["trainer 0, engine 0"] * nodes}
    (run.path / "control" / "launch.json").write_text(json.dumps(values))
    for node in range(nodes):
        heartbeat = {"beat": 3, "state": "running", "stop": None, "failure": None}
        (directory / f"node-{node}.json").write_text(json.dumps(heartbeat))
    (run.path / "state" / "attempts.json").write_text(json.dumps({"attempts": attempt + 1}))


def silence(run: RunDir) -> None:
    for file in run.path.glob("control/attempt-*/node-*.json"):
        os.utime(file, (time.time() - 500,) * 2)


def test_a_fresh_directory_is_not_started(run: RunDir) -> None:
    assert run_state(run) == ("not started", "")
    assert read_attempts(run) == []
    assert last_error(run) is None


def test_a_submitted_run_is_queued(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "queue_state", lambda _: "job 7 is PENDING (Resources)")
    assert run_state(run) == ("queued", "job 7 is PENDING (Resources)")


def test_the_newest_job_is_asked_for(run: RunDir) -> None:
    folder = run.path / "jobs" / "20260101-000000-abc"
    folder.mkdir(parents=True)
    (folder / "12_submitted.pkl").touch()
    assert attempts._job_id(run) == "12"
    begin(run, launch="15-0-0-9")
    assert attempts._job_id(run) == "15"


def test_a_run_goes_from_starting_to_running_to_stopping(run: RunDir) -> None:
    begin(run)
    assert run_state(run)[0] == "starting"
    run.write_progress({"step": 0, "steps": 4, "phase": "start", "done": False})
    assert run_state(run)[0] == "running"
    run.request_stop("time limit")
    assert run_state(run) == ("stopping", "time limit")


@pytest.mark.parametrize(("status", "state"), [("stopped", "stopped"), ("failed", "failed")])
def test_an_ended_attempt_is_the_state_of_the_run(run: RunDir, status: str, state: str) -> None:
    begin(run)
    write_end(run, 0, {"status": status, "message": "so it was", "failure": None})
    assert run_state(run) == (state, "so it was")


def test_a_finished_run_is_done(run: RunDir) -> None:
    begin(run)
    run.write_progress({"step": 4, "steps": 4, "phase": "done", "done": True})
    assert run_state(run) == ("done", "")


def test_nodes_that_have_gone_quiet_are_silent(run: RunDir) -> None:
    begin(run)
    assert [node.state for node in read_nodes(run)] == ["running"]
    silence(run)
    assert run_state(run)[0] == "silent"
    (node,) = read_nodes(run)
    assert (node.host, node.state) == ("alpha", "silent")
    assert node.roles == "trainer 0, engine 0"


@pytest.mark.parametrize(
    ("step_s", "quiet_s", "state"),
    [
        (2.0, 500, "running"),
        (2.0, 700, "silent"),
        (300.0, 700, "running"),
        (300.0, 1600, "silent"),
        (None, 1600, "running"),  # the first step may take long
        (None, 2000, "silent"),
    ],
)
def test_a_trainer_that_hangs_is_seen_though_its_node_lives(
    run: RunDir, step_s: float | None, quiet_s: float, state: str
) -> None:
    begin(run)
    launched = time.time() - 3 * quiet_s
    os.utime(run.path / "control" / "launch.json", (launched,) * 2)
    run.write_progress({"step": 3, "steps": 9, "phase": "general", "done": False})
    row = {"step": 3} if step_s is None else {"step": 3, "time/step": step_s}
    run.metrics_file.write_text(json.dumps(row) + "\n")
    (run.path / "logs" / "trainer-0.0.log").touch()
    (run.path / "logs" / "engine-0.0.log").touch()
    for file in (run.progress_file, run.metrics_file, run.path / "logs" / "trainer-0.0.log"):
        os.utime(file, (time.time() - quiet_s,) * 2)
    found, why = run_state(run)
    assert found == state
    assert ("its trainers wrote nothing for" in why) == (state == "silent")


def test_what_earlier_attempts_ended_by_is_kept_when_the_next_begins(run: RunDir) -> None:
    context, plan = local_context(), layout(run.load_config(), 1, 0)
    begin_launch(run, context, plan)
    run.write_progress({"step": 2, "steps": 4, "phase": "general", "done": False})
    write_end(run, 0, {"status": "stopped", "message": "stopped at step 2", "failure": None})
    begin_launch(run, context, plan)
    heartbeat = {"beat": 3, "state": "running", "stop": "SIGTERM", "failure": None}
    (run.path / "control/attempt-1/node-0.json").write_text(json.dumps(heartbeat))
    begin_launch(run, context, plan)
    begin_launch(run, context, plan)
    found = read_attempts(run)
    assert [one.status for one in found] == [
        "stopped", "interrupted", "interrupted", "under way",
    ]  # fmt: skip
    assert [one.message for one in found] == ["stopped at step 2", "SIGTERM", LOST, ""]
    assert [one.step for one in found] == [2, 2, 2, None]


def test_an_attempt_that_failed_and_was_requeued_has_failed(run: RunDir) -> None:
    message = "engine-0 ended with exit code 3"
    past = {"attempt": 0, "status": "failed", "message": message, "step": 3}
    (run.path / "state" / "attempts.jsonl").write_text(json.dumps(past | {"later": 1}) + "\n")
    begin(run)
    write_end(run, 0, {"status": "stopped", "message": message, "failure": None})
    (attempt,) = read_attempts(run)
    assert (attempt.status, attempt.message, attempt.step) == ("failed", message, 3)


def test_each_attempt_has_an_outcome_and_a_reason(run: RunDir) -> None:
    past = {"attempt": 0, "status": "failed", "step": 2, "message": "trainer-3 was killed"}
    (run.path / "state" / "attempts.jsonl").write_text(json.dumps(past) + '\n{"attempt": 1, "st')
    (run.path / "logs" / "trainer-0.1.log").write_text("x")
    begin(run, attempt=2)
    found = read_attempts(run)
    assert [one.status for one in found] == ["failed", "interrupted", "under way"]
    assert found[0].step == 2
    assert last_writes(run).keys() == {1}
    assert last_error(run) == "attempt 0 at step 2: trainer-3 was killed"


def test_the_work_on_every_export_is_counted(tmp_path: Path) -> None:
    work = {"verb": "eval", "config": "eval.yaml", "tries": 2}
    run = make_run(tmp_path / "tiny", camopd_tree(checkpoint={"on_export": work}))
    for export, shards in (("final", "b"), ("step-000002", "bdf"), ("step-000010", "d")):
        for number, state in enumerate(shards):
            shard = run.path / "evaluations" / export / "shards" / str(number)
            shard.mkdir(parents=True)
            if state == "d":
                (shard / "done.json").write_text("{}")
            if state == "f":
                failure = json.dumps({"what": "it broke", "log": "try-0.log", "detail": ""})
                (shard / "failures.jsonl").write_text(f"{failure}\n" * 2)
    assert read_evaluations(run) == [
        "step-000002: shards done: 1 of 3, 1 failed",
        "step-000010: shards done: 1 of 1",
        "final: shards done: 0 of 1",
    ]
