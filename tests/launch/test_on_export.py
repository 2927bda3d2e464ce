"""What starts for an export, and which exports are left."""

import json
import time
from pathlib import Path

import pytest

from megadistill.config.work import WorkConfig
from megadistill.launch.on_export import ExportWatch, evaluation, export_watch, log_file
from megadistill.rundir import RunDir
from tests.launch.configs import make_config


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))  # no Slurm there
    run = RunDir(tmp_path / "run")
    run.create(make_config())
    return run


def watch(run: RunDir, work: WorkConfig | None = None, keep: int = 2) -> ExportWatch:
    return ExportWatch(run=run, work=work, final=run.export, keep=keep)


def write_exports(run: RunDir, *steps: int) -> None:
    for step in steps:
        run.step_export(step).mkdir(parents=True)
        (run.step_export(step) / "config.json").write_text("{}")


def submitted(run: RunDir, step: int, *, done: bool) -> None:
    """As the work on an export looks in the files of its shards."""
    root = evaluation(run, run.step_export(step))
    shard = root / "shards" / "0123"
    shard.mkdir(parents=True)
    (root / "jobs.json").write_text(json.dumps({"shards": {"1": ["0123"]}}))
    if done:
        (shard / "done.json").write_text("{}")


def left(run: RunDir) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.exports.iterdir())


def test_only_the_newest_exports_are_left(run: RunDir) -> None:
    write_exports(run, 10, 20, 30, 40)
    (run.exports / ".step-000005.deleted").mkdir()  # a kill came between rename and deletion
    watch(run).look()
    assert left(run) == [30, 40]


def test_exports_whose_work_is_done_go_before_older_ones(run: RunDir) -> None:
    write_exports(run, 10, 20, 30)
    for step in (10, 20, 30):
        submitted(run, step, done=step == 20)
    watch(run, WorkConfig(verb="eval")).look()
    assert left(run) == [10, 30]
    assert not log_file(run).exists()


def test_an_export_that_goes_before_its_work_is_done_is_named(run: RunDir) -> None:
    write_exports(run, 10, 20, 30)
    for step in (10, 20, 30):
        submitted(run, step, done=False)
    watch(run, WorkConfig(verb="eval")).look()
    assert left(run) == [20, 30]
    assert "step-000010: deleted before its work was done" in log_file(run).read_text()


def test_an_export_is_not_deleted_while_its_work_is_being_submitted(run: RunDir) -> None:
    write_exports(run, 10, 20)
    exports = watch(run, WorkConfig(verb="eval"), keep=1)
    submitted(run, 20, done=True)
    exports.look()
    assert left(run) == [10]
    exports.finish(timeout_s=60)
    assert "step-000010: not submitted, found no sbatch here" in log_file(run).read_text()


def test_without_slurm_the_run_says_so_once_an_export(run: RunDir) -> None:
    write_exports(run, 10)
    exports = watch(run, WorkConfig(verb="eval"))
    exports.look()
    exports.finish(timeout_s=60)
    assert log_file(run).read_text().count("found no sbatch here") == 1
    assert not exports.is_at_work(run.step_export(10))


def test_a_look_costs_nothing_between_two(run: RunDir) -> None:
    exports = watch(run, keep=1)
    exports.look()
    write_exports(run, 10, 20)
    begun = time.monotonic()
    exports.look()
    assert left(run) == [10, 20] or time.monotonic() - begun > 1
    exports.look(at_once=True)
    assert left(run) == [20]


def test_the_watch_follows_the_configuration(tmp_path: Path) -> None:
    work = {"verb": "eval", "config": "eval.yaml"}
    config = make_config(
        steps=20,
        checkpoint={"every": 5, "export_every": 10, "keep_exports": 3, "on_export": work},
    )
    run = RunDir(tmp_path)
    run.create(config)
    found = export_watch(run)
    assert (found.keep, found.work, found.final) == (3, config.checkpoint.on_export, run.export)
