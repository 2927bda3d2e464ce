from pathlib import Path

import pytest

from megadistill.launch.attempt_log import error_text, note_failure, read_ended
from megadistill.launch.heartbeats import Failure
from megadistill.rundir import RunDir
from tests.launch.configs import make_config


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    config = make_config(runs_dir=str(tmp_path))
    run = RunDir.of(config)
    run.create(config)
    return run


def failure(what: str, detail: str = "", node: int = 1) -> Failure:
    return Failure(node=node, what=f"{what} on node {node} (host{node})", when=0.0, detail=detail)


def test_the_place_and_numbers_do_not_make_another_error() -> None:
    one = failure("trainer-1 ended with exit code 1", "12:01 step 7\nValueError: at 0x7fab, 3.5", 1)
    two = failure("trainer-0 ended with exit code 1", "13:02 x\nValueError: at 0x12, 4.25\n\n", 2)
    assert error_text(one) == error_text(two)
    assert error_text(one).endswith("| ValueError: at #, #.#")
    assert error_text(failure("engine-0 was killed by SIGKILL")) != error_text(one)


def test_the_same_error_is_recognised_at_the_same_step_only(run: RunDir) -> None:
    crash, kill = failure("trainer-0 ended with exit code 1"), failure("trainer-0 was killed")
    assert note_failure(run, 0, crash) is None
    assert note_failure(run, 1, kill) is None
    run.write_progress({"step": 4, "steps": 9, "done": False})
    assert note_failure(run, 2, kill) is None
    run.write_progress({"step": 5, "steps": 9, "done": False})
    assert note_failure(run, 3, kill) is None
    before = note_failure(run, 4, kill)
    assert before is not None
    assert (before.attempt, before.step) == (3, 5)
    assert list(read_ended(run)) == [0, 1, 2, 3, 4]
