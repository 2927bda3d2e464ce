"""Stages on this machine: real processes of the command line that a Slurm array runs too."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megadistill.launch import slurm, stages
from megadistill.launch.commands import command_shard
from megadistill.launch.shards import Shard, ShardFolder, fingerprint, lock_shard, run_shard
from megadistill.launch.stages import Limits, ShardedStage, read_jobs
from tests.launch.fake_shard import (
    GpusArguments,
    ItemsArguments,
    LedgerArguments,
    add_items,
    always_fails,
    show_gpus,
)

ROOT = Path(__file__).parents[2]


def items_shard(directory: Path, part: int, **arguments: Any) -> Shard[ItemsArguments]:
    values = ItemsArguments(ledger=directory / "ledger", part=part, **arguments)
    return Shard(function=add_items, arguments=values, label=f"part {part}")


def stage(directory: Path, shards: list[Shard[Any]], **limits: int) -> ShardedStage:
    root = directory / "stage"
    return ShardedStage(name="items", root=root, shards=shards, limits=Limits(**limits))


def ledger(directory: Path) -> Counter[str]:
    file = directory / "ledger"
    return Counter(file.read_text().splitlines() if file.exists() else [])


def run(directory: Path, shards: list[Shard[Any]], **limits: int) -> ShardedStage:
    found = stage(directory, shards, **limits)
    found.run_here()
    return found


def test_shards_that_fail_once_complete_and_nothing_is_done_twice(tmp_path: Path) -> None:
    shards: list[Shard[Any]] = [items_shard(tmp_path, part) for part in range(2)]
    shards.append(items_shard(tmp_path, 2, fail_once_after=2))
    shards.append(items_shard(tmp_path, 3, fail_once_after=1, how="kill"))
    result = run(tmp_path, shards, concurrency=2)
    result.check()
    assert [directory.parents[1].name for directory in result.outputs] == ["shards"] * 4
    assert [shard.failures for shard in result.states()] == [0, 0, 1, 1]
    every = {f"{part} {item}": 1 for part in range(4) for item in range(3)}
    assert ledger(tmp_path) == every
    run(tmp_path, shards).check()  # finished ones are skipped
    assert ledger(tmp_path) == every


def test_a_shard_that_always_fails_is_reported_and_harms_no_other(tmp_path: Path) -> None:
    arguments = LedgerArguments(ledger=tmp_path / "bad")
    bad = Shard(function=always_fails, arguments=arguments, label="bad")
    result = run(tmp_path, [bad, items_shard(tmp_path, 0)], tries=2, concurrency=1)
    assert (tmp_path / "bad").read_text() == "tried\n" * 2
    assert [shard.status for shard in result.states()] == ["failed", "done"]
    with pytest.raises(ValueError, match="bad luck, always") as raised:
        result.check()
    assert "ended with exit code 1 on" in str(raised.value)
    assert "try-1.log" in str(raised.value)
    assert "1 of 2 shards are done" in str(raised.value)
    run(tmp_path, [bad], tries=1)  # called again, it has its tries again
    assert (tmp_path / "bad").read_text() == "tried\n" * 3


def test_a_shard_is_named_by_what_it_computes_not_by_how(tmp_path: Path) -> None:
    one = items_shard(tmp_path, 3)
    assert one.name == f"part 3 [{one.key}]"
    assert one.key == items_shard(tmp_path, 3, pause_s=9.0).key
    assert one.key == replace(one, label="", gpus=2, environment={"A": "b"}).key
    assert one.key != items_shard(tmp_path, 4).key
    assert one.key != replace(one, version=2).key
    ledger = LedgerArguments(ledger=tmp_path / "ledger")
    assert Shard(function=always_fails, arguments=ledger).key != one.key
    assert command_shard(["x"]).key != command_shard(["x"], depends="input").key


def test_a_shard_is_told_what_it_was_made_with_or_says_what_is_wrong(tmp_path: Path) -> None:
    found = run(tmp_path, [items_shard(tmp_path, 0, pause_s=0.25)])
    (folder,) = found.folders.values()
    values = folder.read()
    assert values["arguments"]["pause_s"] == 0.25
    assert values["entry"] == "tests.launch.fake_shard:add_items"
    folder.done_file.unlink()
    values["arguments"] |= {"items": "many", "more": 1}
    (folder.path / "shard.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"(?s)items.*valid integer.*more.*not permitted"):
        run_shard(folder.path)


def test_directories_are_for_their_owner_only(tmp_path: Path) -> None:
    result = run(tmp_path, [items_shard(tmp_path, 0)])
    output = result.outputs[0]
    for directory in (output, output.parent, output.parents[1], output.parents[2]):
        assert directory.stat().st_mode & 0o777 == 0o700, directory


def test_shards_share_the_gpus_on_offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    shards: list[Shard[Any]] = [
        Shard(
            function=show_gpus,
            arguments=GpusArguments(pause_s=1.0, part=part),
            gpus=2 if part < 2 else 1,
            environment={"OWN": str(part)},
        )
        for part in range(3)
    ]
    result = run(tmp_path, shards, concurrency=2)
    result.check()
    seen = [(directory / "gpus").read_text() for directory in result.outputs]
    assert sorted(seen[:2]) == ["4,5", "6,7"]
    assert seen[2] == "4"
    assert [(directory / "own").read_text() for directory in result.outputs] == ["0", "1", "2"]


def test_a_command_shard_is_a_megadistill_command_line(tmp_path: Path) -> None:
    words = (["config", "schema"], ["status", "nowhere $(id)"])
    result = run(tmp_path, [command_shard(some) for some in words], tries=1)
    assert [shard.status for shard in result.states()] == ["done", "failed"]
    printed = (result.outputs[0].parent / "try-0.log").read_text()
    assert "steps" in json.loads(printed)["properties"]
    assert "nowhere $(id): found no config.yaml" in result.states()[1].detail


def test_a_shard_that_is_done_is_not_run_by_hand_either(tmp_path: Path) -> None:
    result = run(tmp_path, [items_shard(tmp_path, 0)])
    run_shard(result.outputs[0].parent)
    assert ledger(tmp_path) == {f"0 {item}": 1 for item in range(3)}


def test_two_processes_do_not_work_on_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import ExitStack

    from megadistill.launch import shards

    monkeypatch.setattr(shards, "LOCK_WAIT_S", 0.1)
    shard = items_shard(tmp_path, 0)
    (folder,) = stage(tmp_path, [shard]).folders.values()
    folder.create(shard)
    with ExitStack() as stack:
        lock_shard(stack, folder)
        with pytest.raises(ValueError, match="found another process at work on this shard"):
            run(tmp_path, [shard])
    run(tmp_path, [shard]).check()


def test_a_killed_stage_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    shards: list[Shard[Any]] = [
        items_shard(tmp_path, part, items=4, pause_s=0.5) for part in range(2)
    ]
    found = stage(tmp_path, shards)
    found.prepare(afresh=True)
    folders = [str(folder.path) for folder in found.folders.values()]
    code = (
        "import sys; from pathlib import Path\n"
        "from megadistill.launch.shards import ShardFolder, Worker\n"
        "Worker(slots=2, tries=1).work([ShardFolder(Path(p)) for p in sys.argv[1:]])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *folders], cwd=ROOT)
    deadline = time.monotonic() + 60
    while sum(ledger(tmp_path).values()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found.record.state({}).status == "running"
    assert found.record.state({}).progress == "0 of 2, 2 running"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    before = ledger(tmp_path)
    assert (
        found.record.state({}).status == "not submitted"
    )  # by Slurm's jobs, of which there was none
    time.sleep(1)
    assert ledger(tmp_path) == before  # its children are gone
    run(tmp_path, shards).check()
    assert ledger(tmp_path).keys() == {f"{part} {item}" for part in range(2) for item in range(4)}


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a")
    before = fingerprint(tmp_path)
    assert before == fingerprint(tmp_path)
    (tmp_path / "one").write_text("b")
    assert fingerprint(tmp_path) != before
    assert fingerprint(tmp_path / "one", most_bytes=0).startswith("1-")


class FakeArray:
    """An executor that keeps what it is to do."""

    def __init__(self) -> None:
        self.shares: list[list[ShardFolder]] = []

    def update_parameters(self, **_: int) -> None: ...

    def map_array(self, _: Any, shares: list[list[ShardFolder]], tries: list[int]) -> list[Any]:
        assert tries == [3] * len(shares)
        self.shares = shares
        return [SimpleNamespace(job_id="7_0")]


@pytest.mark.parametrize(("room", "sizes"), [(4, [3, 3, 2, 2]), (1, [10]), (1000, [1] * 10)])
def test_more_shards_than_an_array_may_have_share_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(stages, "array_room", lambda: room)
    monkeypatch.setattr(slurm, "make_sacct_usable", lambda: None)
    some = stage(tmp_path, [items_shard(tmp_path, part) for part in range(10)])
    folders = list(some.folders.values())
    some.root.mkdir()
    array = FakeArray()
    assert stages.submit_array(array, some.root, folders, some.limits) == "7"  # type: ignore[arg-type]
    assert [len(share) for share in array.shares] == sizes
    assert {folder for share in array.shares for folder in share} == set(folders)
    assert read_jobs(some.root) == {"7": list(some.folders)}
