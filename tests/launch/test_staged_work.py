"""Stages that read each other's shards, with a result at the end, on this machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megadistill.cli import main
from megadistill.config import RefineConfig, parse
from megadistill.config.cluster import ClusterConfig
from megadistill.inference.staging import begin
from megadistill.launch import staged_work, stages
from megadistill.launch.shards import MAY_WAIT, OUTPUT, Shard, ShardFolder
from megadistill.launch.staged_work import StagedWork, read_states
from megadistill.launch.stages import Limits, ShardedStage, read_jobs
from tests.launch.fake_shard import LedgerArguments, SumArguments, add_up, always_fails
from tests.launch.test_stages import items_shard, ledger
from tests.launch.test_submit import REFUSED


def make_work(directory: Path, cluster: ClusterConfig | None = None, **changed: Any) -> StagedWork:
    """Two shards of items, a sum of what they did, and a stage apart."""
    work = StagedWork(
        name="sums",
        root=directory / "sums",
        command=("config", "schema"),
        limits=Limits(concurrency=2, tries=2),
        cluster=cluster,
    )
    items = work.stage("items", [items_shard(directory, part, **changed) for part in range(2)])
    arguments = SumArguments(items=items.upstream(items.shards))
    work.stage("sum", [Shard(function=add_up, arguments=arguments)], needs=["items"])
    work.stage("apart", [items_shard(directory, 7)])
    assert [stage.name for stage in work.stages] == ["items", "sum", "apart"]
    (directory / "sums").mkdir(exist_ok=True)
    return work


def finish(work: StagedWork) -> str:
    for stage in work.stages:
        stage.check()
    (output,) = work.stages[1].outputs
    return (output / "sum").read_text()


def run(work: StagedWork, **options: bool) -> str:
    return work.carry_out(lambda: finish(work), **options)


def test_stages_run_here_in_order_and_make_a_result_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(make_work(tmp_path)) == "6"
    once = {f"{part} {item}": 1 for part in (0, 1, 7) for item in range(3)}
    assert ledger(tmp_path) == once
    assert run(make_work(tmp_path)) == "6"
    assert ledger(tmp_path) == once
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path / "sums")])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split() for row in rows] == [
        ["items", "done", "2", "of", "2"],
        ["sum", "done", "1", "of", "1"],
        ["apart", "done", "1", "of", "1"],
    ]


def test_a_stage_that_fails_keeps_back_what_reads_it_and_there_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = make_work(tmp_path)
    bad = Shard(function=always_fails, arguments=LedgerArguments(ledger=tmp_path / "bad"))
    work.stages[0] = ShardedStage(
        name="items", root=work.root / "stages" / "items", shards=[bad], limits=work.limits
    )
    with pytest.raises(ValueError, match="bad luck, always"):
        run(work)
    assert "sum: not run, it needs items" in capsys.readouterr().out
    assert ledger(tmp_path).keys() == {f"7 {item}" for item in range(3)}
    found = {state.name: state for state in read_states(work.root)}
    assert [found[name].status for name in found] == ["failed", "not submitted", "done"]
    assert found["items"].progress == "0 of 1, 1 failed"
    assert "bad luck, always" in found["items"].detail


def test_a_shard_is_named_by_the_names_of_those_it_reads_before_they_have_run(
    tmp_path: Path,
) -> None:
    before = make_work(tmp_path)
    key = before.stages[1].shards[0].key
    run(before)
    assert make_work(tmp_path).stages[1].shards[0].key == key
    assert make_work(tmp_path, pause_s=1.0).stages[1].shards[0].key == key
    assert make_work(tmp_path, items=2).stages[1].shards[0].key != key


class FakeSlurm:
    """Takes arrays without running them, each with the jobs it waits for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.arrays: list[tuple[str, str, ClusterConfig]] = []
        self.live: dict[str, str] = {}
        patch.setattr(stages, "batch_executor", self.executor)
        patch.setattr(stages, "submit_array", self.submit)
        patch.setattr(staged_work, "live_jobs", lambda *_: self.live)

    def executor(self, name: str, cluster: ClusterConfig, root: Path, dependency: str) -> Any:
        return name, dependency, cluster

    def submit(self, executor: Any, root: Path, folders: Sequence[ShardFolder], _: Limits) -> str:
        self.arrays.append(executor)
        job = str(len(self.arrays))
        stages.add_job(root, job, [folder.path.name for folder in folders])
        self.live[job] = "PENDING"
        return job

    def dependencies(self) -> list[tuple[str, str]]:
        return [(name, dependency) for name, dependency, _ in self.arrays]


CLUSTER = ClusterConfig(exclusive=True, cpus_per_node=8, gpus_per_node=4)


def test_all_stages_are_submitted_at_once_and_a_job_for_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(monkeypatch)
    said = run(make_work(tmp_path, CLUSTER))
    assert slurm.dependencies() == [
        ("sums-items", ""),
        ("sums-sum", "afterok:1"),
        ("sums-apart", ""),
        ("sums-result", "afterany:1:2:3"),
    ]
    *_, result = (cluster for _, _, cluster in slurm.arrays)
    assert (result.exclusive, result.cpus_per_node, result.gpus_per_node) == (False, 2, 0)
    assert said.splitlines() == [
        "result: job 4",
        f"follow it with: megadistill status {tmp_path}/sums",
    ]
    assert run(make_work(tmp_path, CLUSTER)) == said
    assert len(slurm.arrays) == 4  # all were under way
    run(make_work(tmp_path, CLUSTER, items=2))  # other work in the same directories comes after it
    assert slurm.dependencies()[4:] == [
        ("sums-items", "afterany:1"),
        ("sums-sum", "afterok:5,afterany:2"),
    ]
    assert {state.status for state in read_states(tmp_path / "sums")} == {"queued"}
    work = make_work(tmp_path, CLUSTER, items=2)
    for stage in work.stages:
        stage.run_here()
    (folder,) = work.result.folders.values()
    monkeypatch.setenv(OUTPUT, str(folder.output))
    monkeypatch.setenv(MAY_WAIT, "1")
    assert run(work) == "4"
    assert [state.name for state in read_states(work.root)] == ["items", "sum", "apart", "result"]


def as_shard(directory: Path, patch: pytest.MonkeyPatch) -> ShardFolder:
    """The process is a shard's that may wait for other jobs, such as the one for the result."""
    own = ShardFolder(directory / "own")
    own.output.mkdir(parents=True, exist_ok=True)
    patch.setenv(OUTPUT, str(own.output))
    patch.setenv(MAY_WAIT, "1")
    return own


def test_in_a_shard_what_vanished_is_submitted_again_so_often_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(monkeypatch)
    own = as_shard(tmp_path, monkeypatch)
    for rounds in (1, 2):
        with pytest.raises(SystemExit, match="75"):
            run(make_work(tmp_path, CLUSTER))
        assert own.waits() == (list(slurm.live), rounds)
        slurm.live.clear()  # a lost node, a cluster whose state was wiped
    with pytest.raises(ValueError, match=r"part 0 \[\w+\]: unfinished"):
        run(make_work(tmp_path, CLUSTER))
    assert len(slurm.arrays) == 2 * 3
    for stage in make_work(tmp_path, CLUSTER).stages:
        stage.run_here()
    assert run(make_work(tmp_path, CLUSTER)) == "6"


def test_in_a_shard_that_goes_on_failures_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(monkeypatch)
    own = as_shard(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match="75"):
        run(make_work(tmp_path, CLUSTER))
    slurm.live.clear()
    (folder, _) = make_work(tmp_path, CLUSTER).stages[0].folders.values()
    failed = {"what": "it", "log": "try-0.log", "detail": "all is lost"}
    folder.failures_file.write_text(f"{json.dumps(failed)}\n" * 2)
    with pytest.raises(ValueError, match="all is lost"):
        run(make_work(tmp_path, CLUSTER))
    assert len(slurm.arrays) == 3
    own.waits_file.unlink()  # submitted anew by a person, it has its tries again
    with pytest.raises(SystemExit, match="75"):
        run(make_work(tmp_path, CLUSTER))
    assert len(slurm.arrays) == 6


def test_jobs_noted_by_an_older_version_are_not_taken_for_arrays(tmp_path: Path) -> None:
    (tmp_path / "jobs.json").write_text('{"jobs": ["12"]}')
    assert read_jobs(tmp_path) == {}


@pytest.mark.parametrize("is_new", [True, False])
def test_what_slurm_refuses_leaves_no_new_directory(refusing: Path, is_new: bool) -> None:
    tree = {
        "name": "sums",
        "runs_dir": str(refusing),
        "input": {"path": "rows.jsonl"},
        "rewrite": {"model": "model"},
        "cluster": {},
    }
    if not is_new:
        (refusing / "sums").mkdir()
    work = begin(parse(RefineConfig, tree), "refine")
    assert work.command == ("refine", str(refusing / "sums" / "config.yaml"))
    work.stage("items", [items_shard(refusing, 0)])
    with pytest.raises(ValueError, match=REFUSED):
        work.carry_out(str)
    assert (refusing / "sums" / "config.yaml").exists() != is_new
