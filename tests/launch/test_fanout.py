"""Fan-outs on this machine: real processes of the command line that a Slurm array runs too."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megadistill.launch.fanout import FanoutResult, Limits, Shard, command_shard, run_fanout
from megadistill.launch.shards import ShardFolder, fingerprint, lock_shard, run_shard
from tests.launch import fake_shard

ROOT = Path(__file__).parents[2]


def items_shard(directory: Path, part: int, **arguments: Any) -> Shard:
    values = {"ledger": str(directory / "ledger"), "items": 3, "part": part, **arguments}
    return Shard(entry=f"{fake_shard.__name__}:add_items", arguments=values, label=f"part {part}")


def ledger(directory: Path) -> Counter[str]:
    file = directory / "ledger"
    return Counter(file.read_text().splitlines() if file.exists() else [])


def run(directory: Path, shards: list[Shard], **limits: int) -> FanoutResult:
    return run_fanout(directory / "fanout", shards, Limits(**limits), cluster=None)


def test_shards_that_fail_once_complete_and_nothing_is_done_twice(tmp_path: Path) -> None:
    shards = [items_shard(tmp_path, part) for part in range(2)]
    shards.append(items_shard(tmp_path, 2, fail_once_after=2))
    shards.append(items_shard(tmp_path, 3, fail_once_after=1, how="kill"))
    result = run(tmp_path, shards, concurrency=2)
    result.check()
    assert [directory.parents[1].name for directory in result.directories] == ["shards"] * 4
    assert [shard.failures for shard in result.shards] == [0, 0, 1, 1]
    every = {f"{part} {item}": 1 for part in range(4) for item in range(3)}
    assert ledger(tmp_path) == every
    run(tmp_path, shards).check()  # finished ones are skipped
    assert ledger(tmp_path) == every


def test_a_shard_that_always_fails_is_reported_and_harms_no_other(tmp_path: Path) -> None:
    bad = Shard(
        entry=f"{fake_shard.__name__}:always_fails",
        arguments={"ledger": str(tmp_path / "bad")},
        label="bad",
    )
    result = run(tmp_path, [bad, items_shard(tmp_path, 0)], tries=2, concurrency=1)
    assert (tmp_path / "bad").read_text() == "tried\n" * 2
    assert [shard.status for shard in result.shards] == ["failed", "done"]
    with pytest.raises(ValueError, match="bad luck, always") as raised:
        result.check()
    assert "ended with exit code 1 on" in str(raised.value)
    assert "try-1.log" in str(raised.value)
    assert "1 of 2 shards are done" in str(raised.value)
    run(tmp_path, [bad], tries=1)  # called again, it has its tries again
    assert (tmp_path / "bad").read_text() == "tried\n" * 3


def test_a_shard_is_named_by_what_it_computes() -> None:
    one = Shard(entry="a:b", arguments={"x": 1, "y": 2})
    assert one.key == Shard(entry="a:b", arguments={"y": 2, "x": 1}, label="other").key
    assert one.key != Shard(entry="a:b", arguments={"x": 1, "y": 3}).key
    assert one.key != Shard(entry="a:c", arguments={"x": 1, "y": 2}).key
    assert command_shard(["x"]).key != command_shard(["x"], depends="input").key
    assert one.name == one.key
    assert Shard(entry="a:b", label="part 3").name.startswith("part 3 [")


def test_directories_are_for_their_owner_only(tmp_path: Path) -> None:
    result = run(tmp_path, [items_shard(tmp_path, 0)])
    output = result.directories[0]
    for directory in (output, output.parent, output.parents[1], output.parents[2]):
        assert directory.stat().st_mode & 0o777 == 0o700, directory


def test_shards_share_the_gpus_on_offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    entry = f"{fake_shard.__name__}:show_gpus"
    shards = [Shard(entry=entry, arguments={"pause_s": 1.0, "part": part}) for part in range(2)]
    result = run(tmp_path, shards, concurrency=2, gpus=2)
    result.check()
    seen = {(directory / "gpus").read_text() for directory in result.directories}
    assert seen == {"4,5", "6,7"}


def test_a_command_shard_is_a_megadistill_command_line(tmp_path: Path) -> None:
    good, bad = command_shard(["config", "schema"]), command_shard(["status", "nowhere $(id)"])
    result = run(tmp_path, [good, bad], tries=1)
    assert [shard.status for shard in result.shards] == ["done", "failed"]
    printed = (result.directories[0].parent / "try-0.log").read_text()
    assert "steps" in json.loads(printed)["properties"]
    assert "nowhere $(id): found no config.yaml" in result.shards[1].detail


def test_a_shard_that_is_done_is_not_run_by_hand_either(tmp_path: Path) -> None:
    result = run(tmp_path, [items_shard(tmp_path, 0)])
    run_shard(result.directories[0].parent)
    assert ledger(tmp_path) == {f"0 {item}": 1 for item in range(3)}


def test_two_processes_do_not_work_on_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import ExitStack

    from megadistill.launch import shards

    monkeypatch.setattr(shards, "LOCK_WAIT_S", 0.1)
    shard = items_shard(tmp_path, 0)
    folder = ShardFolder.of(tmp_path / "fanout", shard)
    folder.create(shard)
    with ExitStack() as stack:
        lock_shard(stack, folder)
        with pytest.raises(ValueError, match="found another process at work on this shard"):
            run(tmp_path, [shard])
    run(tmp_path, [shard]).check()


def test_a_killed_fan_out_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    shards = [items_shard(tmp_path, part, items=4, pause_s=0.5) for part in range(2)]
    for shard in shards:
        ShardFolder.of(tmp_path / "fanout", shard).create(shard)
    folders = [str(ShardFolder.of(tmp_path / "fanout", shard).path) for shard in shards]
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
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    before = ledger(tmp_path)
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
