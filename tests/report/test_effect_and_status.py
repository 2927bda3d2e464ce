"""What people look at: the table, the picture, the rollout store, and the progress display."""

import io
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from matplotlib import image
from rich.console import Console

from megadistill.algorithms import Mopd
from megadistill.collect import Batch
from megadistill.report.curves import heldout_names
from megadistill.report.effect import effect_picture, effect_table, effects
from megadistill.report.page import write_page
from megadistill.report.rollouts import store_rollouts
from megadistill.report.status import show, watch
from megadistill.rundir import RunDir
from megadistill.types import Scored
from tests.report.runs import ROWS, Row, make_run, step_row, write_end, write_rows
from tests.tiny import decisions, make_scored


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """An empty run directory."""
    return make_run(tmp_path / "tiny")


def shown_effect(run: RunDir) -> list[list[str]]:
    """The cells of the table's rows."""
    rows: list[list[str]] = effect_table(effects(run)).to_numpy().tolist()
    return rows


def test_the_table_shows_before_after_and_change(run: RunDir) -> None:
    write_rows(run, ROWS)
    assert shown_effect(run) == [
        ["domain", "student ‖ teacher", "0.0000 ± 0.0100", "0.0500 ± 0.0100", "+0.0500"],
        ["domain", "teacher ‖ student", "0.0000 ± 0.0200", "0.0400 ± 0.0200", "+0.0400"],
        ["general", "student ‖ teacher", "0.8000 ± 0.0100", "0.2000 ± 0.0100", "-75%"],
        ["general", "teacher ‖ student", "0.6000 ± 0.0200", "0.3000 ± 0.0200", "-50%"],
    ]


@pytest.mark.parametrize("rows", [[], ROWS[1:2]])
def test_a_run_that_measured_nothing_has_an_empty_table(run: RunDir, rows: list[Row]) -> None:
    write_rows(run, rows)
    assert shown_effect(run) == []


def test_heldout_measurements_are_found_by_name() -> None:
    assert heldout_names(ROWS) == ["domain", "general"]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2], []], ids=["all", "0", "1", "none"])
def test_the_picture_is_a_png_of_three_plots(run: RunDir, rows: list[Row]) -> None:
    write_rows(run, rows)
    file = effect_picture(run, run.report / "effect.png")
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(file)
    height, width, _ = pixels.shape
    assert width > 3 * height
    assert pixels.min() < 0.5 < pixels.max()


def test_more_data_draw_another_picture(run: RunDir) -> None:
    pictures = []
    for rows in (ROWS[:3], ROWS):
        write_rows(run, rows)
        pictures.append(image.imread(effect_picture(run, run.report / "effect.png")))
    assert (pictures[0] != pictures[1]).any()


def make_batch() -> tuple[Batch, list[Scored]]:
    algorithm = decisions()
    assert isinstance(algorithm, Mopd)
    scored = [
        make_scored([-0.5, -1.25], [-0.1, -3.0], rollout_R=[-0.5, -1.0], prompt_id="one"),
        make_scored([-0.3], [-0.3], prompt_id="two"),
    ]
    return Batch(branch="general", selection=algorithm.select(scored), scored=scored), scored


def test_rollouts_come_back_from_their_file(run: RunDir) -> None:
    batch, scored = make_batch()
    store_rollouts(run.rollout_file(1), batch)
    rows = pq.read_table(run.rollout_file(1)).to_pylist()
    assert [row["prompt_id"] for row in rows] == ["one", "two"]
    for row, item in zip(rows, scored, strict=True):
        for name, values in (
            ("student_logprobs", item.student_logprobs_R),
            ("teacher_logprobs", item.teacher_logprobs_R),
            ("rollout_logprobs", item.rollout.logprobs_R),
        ):
            np.testing.assert_array_equal(np.asarray(row[name], dtype=np.float32), values)
        assert row["response_ids"] == item.rollout.response_ids_R.tolist()
        assert row["prompt_ids"] == list(item.rollout.prompt.token_ids)
        assert row["messages"] == [dict(turn) for turn in item.rollout.prompt.messages]
    assert [row["selected"] for row in rows] == [True, False]
    assert [row["score"] for row in rows] == pytest.approx([(0.4 + 1.75) / 2, 0.0], abs=1e-6)
    assert {(row["pool"], row["branch"], row["policy_version"]) for row in rows} == {
        ("general", "general", 0)
    }


def test_rollouts_are_browsable_as_a_data_set(run: RunDir, tmp_path: Path) -> None:
    for step in (1, 2):
        store_rollouts(run.rollout_file(step), make_batch()[0])
    files = str(run.path / "rollouts" / "*.parquet")
    data = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "c"))
    assert len(data) == 4
    assert data.filter(lambda row: row["selected"])["prompt_id"][:] == ["one", "one"]


def test_a_step_can_be_replayed_from_its_rollouts(run: RunDir) -> None:
    """Log-probs and scores in the file give the same selection again."""
    batch, _ = make_batch()
    store_rollouts(run.rollout_file(1), batch)
    scored = [
        make_scored(row["student_logprobs"], row["teacher_logprobs"], branch=row["branch"])
        for row in pq.read_table(run.rollout_file(1)).to_pylist()
    ]
    algorithm = decisions()
    assert isinstance(algorithm, Mopd)
    assert list(algorithm.select(scored).selected) == list(batch.selection.selected)


def test_a_batch_without_rollouts_writes_no_file(run: RunDir) -> None:
    batch = Batch(branch="sft", selection=make_batch()[0].selection)
    store_rollouts(run.rollout_file(1), batch)
    assert list((run.path / "rollouts").iterdir()) == []


def test_no_partial_file_is_left(run: RunDir) -> None:
    store_rollouts(run.rollout_file(1), make_batch()[0])
    assert list((run.path / "rollouts").iterdir()) == [run.rollout_file(1)]


def text_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=160), stream


def shown(run: RunDir) -> str:
    console, stream = text_console()
    show(run, console)
    return stream.getvalue()


def progress(run: RunDir, step: int, *, done: bool = False, phase: str = "general") -> None:
    run.write_progress({"step": step, "steps": 8, "phase": phase, "done": done})


def test_a_run_that_has_not_begun_says_what_it_waits_for(run: RunDir) -> None:
    assert shown(run).startswith(f"tiny: step 0 of {run.load_config().steps}\n")
    assert "not started; waits for its first process" in shown(run)


def test_the_status_shows_the_last_steps_with_their_branch(run: RunDir) -> None:
    write_rows(run, ROWS)
    progress(run, 4)
    text = shown(run)
    assert "tiny: step 4 of 8  ETA 0:08" in text
    (line,) = [line for line in text.splitlines() if line.split()[:2] == ["3", "domain"]]
    assert line.split()[2:] == ["-0.1234", "-0.250", "75%", "3.21", "123", "55", "2.0"]


def test_time_left_counts_evaluations(run: RunDir) -> None:
    write_rows(run, [step_row(1, "general", **{"time/evaluate": 60.0})])
    progress(run, 1)
    assert "ETA 7:14" in shown(run)


def test_a_run_before_its_first_step_says_what_it_does(run: RunDir) -> None:
    write_rows(run, ROWS[:1])
    progress(run, 0, phase="start")
    assert "step 0 of 8  start" in shown(run)


def test_the_status_shows_memory_and_how_the_last_attempts_ended(run: RunDir) -> None:
    write_rows(run, [step_row(1, "general", **{"memory/trainer_gib": 61.25})])
    progress(run, 1)
    kept = [
        {"attempt": number, "status": "stopped", "message": f"reason {number}", "step": number}
        for number in range(5)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    (run.path / "state" / "attempts.jsonl").write_text(lines)
    (run.path / "state" / "attempts.json").write_text('{"attempts": 5}')
    text = shown(run)
    assert "memory of the fullest trainer: 61.2 GiB" in text
    assert "attempts 5: 5 stopped" in text
    assert "attempt 4 stopped at step 4: reason 4" in text
    assert "reason 1" not in text


def test_watching_prints_each_step_once_until_the_run_is_done(run: RunDir) -> None:
    write_rows(run, ROWS[:2])
    progress(run, 1)
    console, stream = text_console()

    def train_on() -> None:
        time.sleep(0.1)
        write_rows(run, ROWS)
        progress(run, 8, done=True)

    trainer = threading.Thread(target=train_on)
    trainer.start()
    watch(run, console, interval_s=0.01, give_up_s=20)
    trainer.join()
    first, *lines = stream.getvalue().splitlines()
    assert first == "tiny: not started; waits for its first process"
    assert [line.split()[1] for line in lines] == ["0", "1", "2", "3", "4"]
    assert "phase domain" in lines[3]


def test_watching_a_finished_run_shows_it_and_ends(run: RunDir) -> None:
    write_rows(run, ROWS)
    progress(run, 8, done=True)
    console, stream = text_console()
    watch(run, console, interval_s=60, give_up_s=60)
    assert len(stream.getvalue().splitlines()) == 5


def test_watching_gives_up_on_a_silent_run(run: RunDir) -> None:
    console, _ = text_console()
    with pytest.raises(ValueError, match="nothing was written for 0 s"):
        watch(run, console, interval_s=0.01, give_up_s=0.05)


def test_watching_is_patient_while_any_role_writes(run: RunDir) -> None:
    engine = run.path / "logs" / "engine-0.0.log"
    stop = time.monotonic() + 1.0

    def load() -> None:
        while time.monotonic() < stop:
            engine.write_text("loading")
            time.sleep(0.01)

    thread = threading.Thread(target=load)
    thread.start()
    with pytest.raises(ValueError, match="nothing was written"):
        watch(run, text_console()[0], interval_s=0.01, give_up_s=0.3)
    assert time.monotonic() > stop
    thread.join()


def test_watching_a_run_that_fails_ends_with_the_cause(run: RunDir) -> None:
    console, _ = text_console()
    failure = {"node": 1, "what": "engine 0", "when": 0.0, "detail": "out of memory"}
    end = {"status": "failed", "message": "engine 0 on node-1 ended", "failure": failure}

    def fail() -> None:
        time.sleep(0.1)
        write_end(run, 0, end)

    launcher = threading.Thread(target=fail)
    launcher.start()
    with pytest.raises(ValueError, match="engine 0 on node-1 ended\nout of memory"):
        watch(run, console, interval_s=0.01, give_up_s=20)
    launcher.join()


def watched(run: RunDir) -> list[str]:
    """What is said in the moment in which one begins to watch."""
    console, stream = text_console()
    with pytest.raises(ValueError, match="nothing was written"):
        watch(run, console, interval_s=0.01, give_up_s=0.05)
    return stream.getvalue().splitlines()


def test_watching_says_at_once_what_a_run_waits_for(run: RunDir, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    make = f"`megadistill train` or `megadistill submit train` to make {nowhere}"
    assert watched(RunDir(nowhere)) == [f"nowhere: not there yet; waits for {make}"]
    again = f"another attempt (`megadistill train {run.path}`, or submit it again)"
    for status in ("failed", "stopped"):
        write_end(run, 0, {"status": status, "message": "so it was", "failure": None})
        end = run.path / "control" / "attempt-0" / "ended.json"
        os.utime(end, (time.time() - 500,) * 2)  # before one began to watch
        assert watched(run) == [f"tiny: {status}  so it was; waits for {again}"]


def test_a_live_terminal_says_that_a_run_is_not_there(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=160, force_terminal=True)
    with pytest.raises(ValueError, match="nothing was written"):
        watch(RunDir(tmp_path / "nowhere"), console, interval_s=0.01, give_up_s=0.05)
    assert "not there yet" in stream.getvalue()


def test_the_status_of_a_failed_run_shows_the_last_line_of_its_role(run: RunDir) -> None:
    detail = "Traceback\nRuntimeError: CUDA out of memory\n"
    failure = {"node": 0, "what": "trainer-0 ended", "when": 0.0, "detail": detail}
    write_end(run, 0, {"status": "failed", "message": "trainer-0 ended", "failure": failure})
    text = shown(run)
    assert (
        "last error: attempt 0 at step 0: trainer-0 ended: RuntimeError: CUDA out of memory" in text
    )
    assert f"tiny: step 0 of {run.load_config().steps}\n" in text


def test_what_another_version_wrote_hides_nothing(run: RunDir) -> None:
    write_rows(run, [*ROWS, {"step": 5, "loss": 0.25, "later": 1}])
    run.write_progress({"step": 5, "steps": 8, "later": 1})
    settings = yaml.safe_load(run.config_file.read_text())
    settings |= {"later": 1, "data": settings["data"] | {"later": 2}}
    run.config_file.write_text(yaml.safe_dump(settings))
    launch = {"launch_id": "x", "attempt": 1, "master_port": 1, "later": 1}
    launch |= {"hosts": ["alpha"], "roles": ["trainer 0"]}
    (run.path / "control" / "launch.json").write_text(json.dumps(launch))
    beat = {"beat": 1, "state": "running", "stop": None, "failure": None, "later": 1}
    failure = {"node": 0, "what": "it broke", "when": 0.0, "later": 1}
    write_end(run, 0, {"status": "failed", "message": "it broke", "failure": failure, "later": 1})
    (run.path / "control" / "attempt-1").mkdir()
    (run.path / "control" / "attempt-1" / "node-0.json").write_text(json.dumps(beat))
    past = {"attempt": 0, "status": "failed", "message": "it broke", "step": 3, "later": 1}
    (run.path / "state" / "attempts.jsonl").write_text(json.dumps(past) + "\n")
    text = shown(run)
    for found in ("step 5 of 8", "+0.2500", "alpha", "last error: attempt 0 at step 3: it broke"):
        assert found in text
    assert "it broke" in write_page(run, run.report / "report.html").read_text()


def test_a_live_terminal_shows_the_run_until_it_is_done(run: RunDir) -> None:
    write_rows(run, ROWS)
    progress(run, 8, done=True)
    stream = io.StringIO()
    watch(run, Console(file=stream, width=120, force_terminal=True), interval_s=1, give_up_s=5)
    assert "step 8 of 8" in stream.getvalue()


def test_likelihoods_of_answers_are_shown_beside_divergences(run: RunDir, tmp_path: Path) -> None:
    def row(step: int, nll: float) -> Row:
        answers = {"heldout/answers/nll": nll, "heldout/answers/nll_stderr": 0.25}
        return ROWS[0] | {"step": step} | answers

    write_rows(run, [row(0, 2.0), row(4, 1.5)])
    shown = shown_effect(run)
    assert ["answers", "reference answers", "2.0000 ± 0.2500", "1.5000 ± 0.2500", "-25%"] in shown
    assert effect_picture(run, tmp_path / "effect.png").exists()
