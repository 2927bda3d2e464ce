"""The run directory: nothing is ever half written, nothing torn is taken for whole."""

import datetime
import json
import os
import re
import stat
from pathlib import Path

import pytest

from megadistill.config import ConfigError, RunConfig
from megadistill.rundir import (
    WHOLE,
    RunDir,
    changed_settings,
    damaged_files,
    is_whole,
)
from tests.tiny import Tree, camopd_tree, make_config, set_today


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory as it is before the first attempt."""
    run = RunDir(tmp_path / "runs" / "tiny")
    run.create(make_config())
    return run


def write_checkpoint(run: RunDir, step: int) -> Path:
    with run.writing_checkpoint(step) as directory:
        (directory / "weights").mkdir()
        (directory / "weights" / "rank-0.bin").write_bytes(b"w" * 100)
        (directory / "state.json").write_text("{}")
    return directory


def steps(run: RunDir) -> list[int]:
    return [step for step, _ in run.whole_checkpoints()]


def dated(changes: Tree | None = None) -> RunConfig:
    """The configuration of a run that begins today."""
    tree = camopd_tree(**(changes or {}))
    tree["data"]["date"] = str(datetime.date.today())
    return make_config(tree)


def test_the_directory_is_named_by_the_configuration(tmp_path: Path) -> None:
    config = make_config(camopd_tree(runs_dir=str(tmp_path), name="mine"))
    assert RunDir.of(config).path == tmp_path / "mine"
    assert RunDir.of(make_config()).path == Path.cwd() / "runs" / "tiny"


def test_the_directory_holds_the_resolved_configuration(run: RunDir) -> None:
    assert run.load_config() == dated()


def test_a_configuration_that_is_no_run_is_named_by_those_who_only_look(run: RunDir) -> None:
    run.config_file.write_text("name: r\nunknown: 1\n")
    with pytest.raises(ConfigError) as caught:
        run.look_at_config()
    first, *missing = str(caught.value).splitlines()
    assert first == f"{run.config_file}: 4 problem(s)"
    assert missing[0] == "  steps: Field required"


def test_the_day_on_which_a_run_began_stays_the_date_of_its_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume on another day, or another node past midnight, reads it in the run directory."""
    set_today(monkeypatch, "2026-03-01")
    run = RunDir(tmp_path / "tiny")
    run.create(make_config())
    set_today(monkeypatch, "2026-03-02")
    run.create(make_config())
    assert run.load_config().data.date == datetime.date(2026, 3, 1)
    run.write_progress({"step": 4, "steps": 4, "done": True})
    assert run.has_done(make_config())
    other = camopd_tree()
    other["data"]["date"] = "2026-03-02"
    with pytest.raises(ValueError, match=r"data\.date: 2026-03-01 -> 2026-03-02"):
        run.create(make_config(other))


def test_only_the_owner_may_look_inside(run: RunDir) -> None:
    for directory in (run.path, *(path for path in run.path.iterdir() if path.is_dir())):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory


def test_creating_a_run_again_changes_nothing(run: RunDir) -> None:
    write_checkpoint(run, 3)
    run.create(make_config())
    assert steps(run) == [3]


def test_other_settings_are_refused_and_named(run: RunDir) -> None:
    tree = camopd_tree(seed=7, optimizer={"lr": 1e-3})
    tree["algorithm"]["general"]["mass"] = 0.6
    with pytest.raises(ValueError, match="holds a run with other settings") as caught:
        run.create(make_config(tree))
    for named in (
        "seed: 0 -> 7",
        "optimizer.lr: 2e-06 -> 0.001",
        "algorithm.general.mass: 0.8 -> 0.6",
    ):
        assert named in str(caught.value)
    assert run.load_config() == dated()


def test_a_changed_value_is_named_even_where_another_key_has_it() -> None:
    old, new = "a: {size: 4}\nb: {size: 8}\n", "a: {size: 8}\nb: {size: 8}\n"
    assert changed_settings(old, new) == {"a.size": "4 -> 8"}


def test_added_and_removed_settings_are_named() -> None:
    changes = changed_settings("a: 1\n", "b: null\n")
    assert changes == {"a": "1 -> absent", "b": "absent -> None"}


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": {"time_minutes": 60, "partition": "short"}},
        {"log": {"wandb": "online"}},
        {"rollout": {"max_tokens": 16, "timeout_s": 9, "start_timeout_s": 9}},
        {"checkpoint": {"every": 3}},
        {"steps": 9},
        {"parallel": {"tp": 2, "pp": 2, "threads": 3}},
        {"rollout": {"max_tokens": 16, "engines": 3, "placement": "split", "memory_fraction": 0.5}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_resumes_under_settings_that_do_not_touch_what_it_computes(
    run: RunDir, change: Tree
) -> None:
    run.write_progress({"step": 3, "done": False})
    config = make_config(camopd_tree() | change)
    run.create(config)
    assert run.load_config() == dated(change)
    (event,) = [json.loads(line) for line in (run.path / "state/events.jsonl").open()]
    assert event["what"] == "settings changed"
    assert any(key.startswith(next(iter(change))) for key in event)


def test_a_finished_run_takes_more_steps_and_keeps_the_student_it_had(run: RunDir) -> None:
    run.export.mkdir()
    (run.export / "model.safetensors").write_text("weights")
    run.write_progress({"step": 4, "steps": 4, "done": True})
    assert run.has_done(make_config())
    longer = make_config(camopd_tree(steps=9))
    assert not run.has_done(longer)
    run.create(longer)
    assert run.read_progress() | {"updated": 0} == {
        "step": 4,
        "steps": 9,
        "done": False,
        "updated": 0,
    }
    assert not run.export.exists()
    assert (run.step_export(4) / "model.safetensors").read_text() == "weights"
    assert not run.has_done(longer)


def test_a_finished_run_is_not_done_for_other_settings(run: RunDir) -> None:
    run.write_progress({"step": 4, "steps": 4, "done": True})
    assert run.has_done(make_config(camopd_tree(log={"wandb": "online"})))
    assert not run.has_done(make_config(camopd_tree(seed=7)))


def test_a_run_of_an_older_version_resumes_with_the_defaults_of_newer_settings(
    run: RunDir,
) -> None:
    text = run.config_file.read_text()
    assert "  warmup_steps: 0\n" in text
    run.config_file.write_text(text.replace("  warmup_steps: 0\n", ""))
    run.create(make_config())
    with pytest.raises(ValueError, match="warmup_steps: 0 -> 2"):
        run.create(make_config(camopd_tree(optimizer={"warmup_steps": 2})))


@pytest.mark.parametrize(
    ("progress", "change"),
    [
        ({"step": 3, "done": False}, {"steps": 3}),  # already there
        ({"step": 1, "done": False}, {"steps": 9, "optimizer": {"decay": "cosine"}}),
        ({"step": 4, "done": True}, {"steps": 9, "optimizer": {"decay": "linear"}}),
    ],
)
def test_more_steps_are_refused_where_they_would_change_the_run(
    tmp_path: Path, progress: Tree, change: Tree
) -> None:
    run = RunDir(tmp_path / "run")
    run.create(make_config(camopd_tree() | change | {"steps": 4}))
    run.write_progress(progress)
    with pytest.raises(ValueError, match=f"steps: 4 -> {change['steps']}"):
        run.create(make_config(camopd_tree() | change))


def test_the_token_is_secret_long_and_the_same_for_everybody(run: RunDir) -> None:
    token = run.token()
    assert len(token) >= 32
    assert RunDir(run.path).token() == token
    assert stat.S_IMODE((run.path / "control" / "token").stat().st_mode) == 0o600


def test_the_token_is_secret_under_any_umask(run: RunDir) -> None:
    before = os.umask(0)
    try:
        run.token()
    finally:
        os.umask(before)
    assert stat.S_IMODE((run.path / "control" / "token").stat().st_mode) == 0o600


def test_a_new_attempt_clears_what_the_last_one_left(run: RunDir) -> None:
    assert run.begin_attempt() == 0
    token = run.token()
    run.engine_file(0).write_text("{}")
    run.request_stop("time limit")
    assert run.stop_file.read_text() == "time limit"
    assert run.begin_attempt() == 1
    assert not run.engine_file(0).exists()
    assert not run.stop_file.exists()
    assert run.token() != token
    assert run.begin_attempt() == 2


def test_progress_is_empty_before_the_first_step(run: RunDir) -> None:
    assert run.read_progress() == {}
    run.write_progress({"step": 3, "done": False})
    progress = run.read_progress()
    assert (progress["step"], progress["done"]) == (3, False)
    assert progress["updated"] > 0


@pytest.mark.parametrize(
    ("text", "found"),
    [("{nope", "found no JSON"), ("[1]", r"found '\[1\]'"), ("", "found no JSON")],
)
def test_damaged_progress_is_named(run: RunDir, text: str, found: str) -> None:
    run.progress_file.write_text(text)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(run.progress_file))}: damaged, {found}"
    ):
        run.read_progress()


def test_a_finished_checkpoint_is_whole(run: RunDir) -> None:
    directory = write_checkpoint(run, 10)
    assert run.whole_checkpoints() == [(10, directory)]
    assert directory.name == "step-000010"


def test_whole_checkpoints_come_in_order_of_their_steps(run: RunDir) -> None:
    for step in (30, 9, 1_000_000):
        write_checkpoint(run, step)
    assert steps(run) == [9, 30, 1_000_000]


def test_a_checkpoint_whose_writing_failed_is_not_whole(run: RunDir) -> None:
    def fail() -> None:
        with run.writing_checkpoint(10) as directory:
            (directory / "state.json").write_text("{}")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert run.checkpoint(10).exists()
    assert steps(run) == []


def test_a_checkpoint_is_not_whole_while_it_is_written(run: RunDir) -> None:
    with run.writing_checkpoint(10) as directory:
        (directory / "state.json").write_text("{}")
        assert not is_whole(directory)
    assert is_whole(directory)


def test_a_truncated_file_makes_a_checkpoint_torn(run: RunDir) -> None:
    directory = write_checkpoint(run, 10)
    os.truncate(directory / "weights" / "rank-0.bin", 99)
    assert steps(run) == []


def test_a_missing_file_makes_a_checkpoint_torn(run: RunDir) -> None:
    directory = write_checkpoint(run, 10)
    (directory / "weights" / "rank-0.bin").unlink()
    assert steps(run) == []


@pytest.mark.parametrize("text", [b"", b'{"sizes": {"wei', b"\xff\xfe\x00", b"{}"])
def test_a_torn_mark_makes_a_checkpoint_torn(run: RunDir, text: bytes) -> None:
    directory = write_checkpoint(run, 10)
    (directory / WHOLE).write_bytes(text)
    assert steps(run) == []


def test_changed_content_of_the_same_size_is_found(run: RunDir) -> None:
    directory = write_checkpoint(run, 10)
    assert damaged_files(directory) == []
    (directory / "weights" / "rank-0.bin").write_bytes(b"w" * 99 + b"x")
    assert is_whole(directory)
    assert damaged_files(directory) == ["weights/rank-0.bin"]


def test_writing_a_step_again_starts_from_an_empty_directory(run: RunDir) -> None:
    directory = write_checkpoint(run, 10)
    (directory / "leftover").write_text("x")
    write_checkpoint(run, 10)
    assert not (directory / "leftover").exists()
    assert steps(run) == [10]


def test_old_checkpoints_go_and_the_newest_stay(run: RunDir) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(run, step)
    run.drop_old_checkpoints(keep=2)
    assert steps(run) == [3, 4]
    assert not run.checkpoint(1).exists()


def test_torn_checkpoints_go_only_when_a_newer_one_is_whole(run: RunDir) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(run, step)
    (run.checkpoint(1) / WHOLE).unlink()
    (run.checkpoint(3) / WHOLE).unlink()
    (run.checkpoint(4) / WHOLE).unlink()
    run.drop_old_checkpoints(keep=2)
    assert steps(run) == [2]
    assert not run.checkpoint(1).exists()
    assert run.checkpoint(4).exists()


def test_nothing_is_dropped_where_nothing_is_whole(run: RunDir) -> None:
    (write_checkpoint(run, 1) / WHOLE).unlink()
    run.drop_old_checkpoints(keep=1)
    assert run.checkpoint(1).exists()


def test_rollout_files_are_numbered_by_step(run: RunDir) -> None:
    assert run.rollout_file(10) == run.path / "rollouts" / "step-000010.parquet"


@pytest.mark.parametrize("change", [{"name": "other"}, {"batch": {"size": 5}}])
def test_any_other_setting_is_another_run(run: RunDir, change: Tree) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        run.create(make_config(camopd_tree(**change)))
