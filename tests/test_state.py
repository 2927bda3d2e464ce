"""Saving and restoring a run with a fake engine, on one rank and on two."""

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megadistill.config import RunConfig
from megadistill.rundir import WHOLE, RunDir, is_whole
from megadistill.state import RunState, fingerprint, restore, save
from tests.fake_engines import FakeTrainingEngine
from tests.tiny import camopd_tree, make_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run whose student and teachers are files below `tmp_path`."""
    for name in ("general", "domain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 10)
    teachers = {name: {"path": str(tmp_path / name)} for name in ("general", "domain")}
    return make_config(camopd_tree(student=teachers["domain"], teachers=teachers))


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> RunDir:
    """The directory of that run, before its first attempt."""
    run = RunDir(tmp_path / "run")
    run.create(config)
    return run


def train_to(run: RunDir, config: RunConfig, steps: int, keep: int = 9) -> RunState:
    """Pretend to train: weights equal the step; a checkpoint after each."""
    engine = FakeTrainingEngine()
    state = restore(run, engine, config)
    for step in range(state.step, steps):
        engine.weights = step + 1
        state = state.after(step, {"general": 4 * (step + 1)}, {})
        save(run, engine, state, keep)
    return state


def test_a_new_run_starts_at_step_zero_and_marks_its_models(run: RunDir, config: RunConfig) -> None:
    state = restore(run, FakeTrainingEngine(), config)
    assert (state.step, dict(state.cursors)) == (0, {})
    assert set(state.models) == {"student", "teachers.general", "teachers.domain"}
    assert state.models["student"] == state.models["teachers.domain"]
    assert state.models["student"] != state.models["teachers.general"]


def test_a_saved_state_is_restored_with_the_weights(run: RunDir, config: RunConfig) -> None:
    saved = train_to(run, config, steps=3)
    engine = FakeTrainingEngine()
    assert restore(run, engine, config) == saved
    assert engine.weights == 3
    assert saved.cursors == {"general": 12}


def test_a_torn_checkpoint_falls_back_to_the_one_before(
    run: RunDir, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    train_to(run, config, steps=3)
    (run.checkpoint(3) / "rank-0.txt").unlink()
    engine = FakeTrainingEngine()
    with caplog.at_level(logging.WARNING):
        state = restore(run, engine, config)
    assert (state.step, engine.weights) == (2, 2)
    assert "step-000003 is torn or damaged and is passed over" in caplog.text


def test_several_torn_checkpoints_are_passed_over(run: RunDir, config: RunConfig) -> None:
    train_to(run, config, steps=4)
    for step in (2, 3, 4):
        (run.checkpoint(step) / "extra.json").write_text("{")
    (run.checkpoint(3) / WHOLE).write_bytes(b"\xff")
    assert restore(run, FakeTrainingEngine(), config).step == 1


def test_a_checkpoint_with_other_content_of_the_same_size_is_passed_over(
    run: RunDir, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """As a crash leaves it when the disk had the new size but not yet the data."""
    train_to(run, config, steps=3)
    (run.checkpoint(3) / "rank-0.txt").write_text("\0")
    assert is_whole(run.checkpoint(3))
    assert restore(run, FakeTrainingEngine(), config).step == 2
    assert "step-000003 is torn or damaged and is passed over: rank-0.txt" in caplog.text


def test_a_run_killed_while_it_first_saves_starts_anew(run: RunDir, config: RunConfig) -> None:
    train_to(run, config, steps=1)
    run.write_progress({"step": 1})  # logged before the checkpoint that a kill left unfinished
    (run.checkpoint(1) / WHOLE).unlink()
    assert restore(run, FakeTrainingEngine(), config).step == 0


@pytest.mark.parametrize("damage", ["content", "mark"])
def test_with_every_checkpoint_damaged_a_run_is_refused_unless_told_to_start_over(
    run: RunDir, config: RunConfig, damage: str
) -> None:
    train_to(run, config, steps=3)
    run.write_progress({"step": 4})
    for directory in run.checkpoints():
        (directory / (WHOLE if damage == "mark" else "rank-0.txt")).unlink()
    with pytest.raises(ValueError, match="found no checkpoint to go on from") as caught:
        restore(run, FakeTrainingEngine(), config)
    assert "step-000002 is torn or damaged: not finished" in str(caught.value)
    assert "step-000003 is torn or damaged: not finished" in str(caught.value)
    assert "checkpoint.start_over=true" in str(caught.value)
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("start_over: false", "start_over: true"))
    assert restore(run, FakeTrainingEngine(), config).step == 0


def test_a_save_that_fails_leaves_the_last_checkpoint(run: RunDir, config: RunConfig) -> None:
    class FullDisk(FakeTrainingEngine):
        def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
            raise OSError("no space left")

    state = train_to(run, config, steps=2)
    with pytest.raises(OSError, match="no space left"):
        save(run, FullDisk(), state.after(2, {}, {}), keep=1)
    assert restore(run, FakeTrainingEngine(), config).step == 2


def test_only_the_newest_checkpoints_are_kept(run: RunDir, config: RunConfig) -> None:
    train_to(run, config, steps=5, keep=2)
    assert [step for step, _ in run.whole_checkpoints()] == [4, 5]


@pytest.mark.parametrize(
    ("model", "keys"),
    [("general", "teachers.general"), ("domain", "student, teachers.domain")],
)
def test_a_changed_model_is_refused_by_its_keys(
    run: RunDir, config: RunConfig, tmp_path: Path, model: str, keys: str
) -> None:
    train_to(run, config, steps=2)
    (tmp_path / model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=f"^{keys}: the files changed since"):
        restore(run, FakeTrainingEngine(), config)


def test_fingerprints_notice_content_size_and_name(tmp_path: Path) -> None:
    marks = []
    for content, name in ((b"abc", "a"), (b"abd", "a"), (b"abcd", "a"), (b"abc", "b")):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        marks.append(fingerprint(str(tmp_path)))
        file.unlink()
    assert len(set(marks)) == 4


def test_fingerprints_look_beyond_the_beginning_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = bytearray(6 << 20)
    marks = []
    for place in (None, 3 << 20, (6 << 20) - 1):
        if place is not None:
            content[place] += 1
        file.write_bytes(content)
        marks.append(fingerprint(str(tmp_path)))
    assert len(set(marks)) == 3


def test_a_hub_name_has_the_fingerprint_of_its_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    assert fingerprint("org/name") == fingerprint(str(tmp_path))


def test_a_model_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no"):
        fingerprint(str(tmp_path))
    with pytest.raises(ValueError, match="gone', which does not exist"):
        fingerprint(str(tmp_path / "gone"))


def test_fingerprints_do_not_depend_on_where_a_model_lies(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert fingerprint(str(tmp_path / "here")) == fingerprint(str(tmp_path / "there"))


def test_two_ranks_save_one_checkpoint_that_is_whole_only_when_both_have_written(
    run: RunDir, config: RunConfig
) -> None:
    """Rank 1 holds its part back until it has seen what rank 0 calls whole meanwhile."""
    seen: list[bool] = []

    class Slow(FakeTrainingEngine):
        def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
            assert directory.is_dir()
            seen.append(is_whole(directory))
            super().save(directory, extra)

    first, second = two_ranks(7, 8)
    slow = Slow(**vars(second))
    ranks = [first, slow]
    state = RunState(step=5, models={})
    on_both(ranks, lambda engine: save(run, engine, state, 2))
    assert seen == [False]
    assert is_whole(run.checkpoint(5))
    loaded = two_ranks(0, 0)
    with pytest.raises(ValueError, match="the files changed"):
        restore(run, FakeTrainingEngine(), config)  # this state names no models
    on_both(loaded, lambda engine: engine.load(run.checkpoint(5)))
    assert [engine.weights for engine in loaded] == [7, 8]


def test_two_ranks_restore_the_checkpoint_that_rank_zero_names(
    run: RunDir, config: RunConfig
) -> None:
    ranks = two_ranks(1, 2)
    states: dict[int, RunState] = {}

    def save_and_restore(engine: FakeTrainingEngine) -> None:
        state = restore(run, engine, config)
        save(run, engine, state.after(0, {}, {}), 2)
        states[engine.rank] = restore(run, engine, config)

    on_both(ranks, save_and_restore)
    assert states[0] == states[1]
    assert states[0].step == 1


def two_ranks(*weights: int) -> list[FakeTrainingEngine]:
    """Two ranks that meet."""
    meeting, board = threading.Barrier(2), [None]
    return [
        FakeTrainingEngine(weights=value, rank=rank, meeting=meeting, board=board)
        for rank, value in enumerate(weights)
    ]


def on_both(ranks: list[FakeTrainingEngine], work: Any) -> None:
    """Run `work` on both ranks at once; what goes wrong on either is raised."""
    errors: list[BaseException] = []

    def guarded(engine: FakeTrainingEngine) -> None:
        try:
            work(engine)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)
            engine.meeting.abort()

    threads = [threading.Thread(target=guarded, args=(engine,)) for engine in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_the_state_counts_steps_from_one_once_taken() -> None:
    state = RunState(models={"student": "x"})
    assert state.after(0, {"general": 4}, {"sft": 2.0}) == RunState(
        step=1, cursors={"general": 4}, algorithm={"sft": 2.0}, models={"student": "x"}
    )


def test_a_state_keeps_its_own_copy_of_the_cursors() -> None:
    cursors = {"general": 4}
    state = RunState().after(0, cursors, {})
    cursors["general"] = 8
    assert state.cursors == {"general": 4}
