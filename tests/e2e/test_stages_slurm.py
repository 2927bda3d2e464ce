"""Arrays of shards on a real Slurm of four nodes, as the library's user starts them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megadistill.config.cluster import ClusterConfig
from megadistill.launch import slurm
from megadistill.launch.shards import Shard
from megadistill.launch.staged_work import cancel
from megadistill.launch.stages import ShardedStage, read_jobs
from tests.e2e.local_slurm import ROOT, Cluster, local_cluster, wait_until
from tests.inference.serving_shard import ServeArguments, serve_two
from tests.launch.fake_shard import WaitsArguments, waits
from tests.launch.test_stages import items_shard, ledger
from tests.tiny import write_model_config

pytestmark = pytest.mark.slurm

SHARED = ClusterConfig(exclusive=False, cpus_per_node=1, time_minutes=30, signal_seconds=60)
"""Many of these jobs fit a node."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        patch.setenv("PATH", os.environ["PATH"])  # submission may put a stand-in on it
        patch.chdir(ROOT)
        patch.setattr(slurm, "WAIT_POLL_S", 0.5)
        yield started


def stage(directory: Path, shards: list[Shard[Any]]) -> ShardedStage:
    return ShardedStage(name="items", root=directory / "stage", shards=shards, cluster=SHARED)


def submit(some: ShardedStage) -> list[str]:
    return some.submit(slurm.live_jobs())


def wait_for_end(jobs: list[str]) -> None:
    wait_until(lambda: not set(jobs) & slurm.live_jobs().keys(), lambda: str(slurm.live_jobs()))


def test_of_eight_shards_two_fail_once_and_nothing_is_done_twice(
    cluster: Cluster, tmp_path: Path
) -> None:
    troubles: dict[int, dict[str, Any]] = {
        2: {"fail_once_after": 1},
        5: {"fail_once_after": 2, "how": "kill"},
    }
    some = stage(
        tmp_path, [items_shard(tmp_path, part, **troubles.get(part, {})) for part in range(8)]
    )
    (job,) = submit(some)
    wait_for_end([job])
    some.check()
    assert [shard.failures for shard in some.states()] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert ledger(tmp_path) == {f"{part} {item}": 1 for part in range(8) for item in range(3)}
    assert list(read_jobs(some.root)) == [job]
    assert submit(some) == []
    assert list(read_jobs(some.root)) == [job]  # all is done: nothing was submitted


def test_a_warned_shard_is_requeued_alone_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    shards: list[Shard[Any]] = [
        items_shard(tmp_path, part, items=8, pause_s=0.5) for part in range(2)
    ]
    some = stage(tmp_path, shards)
    (job,) = submit(some)
    assert submit(some) == [job]  # it is under way: nothing is added
    more = stage(tmp_path, [*shards, items_shard(tmp_path, 2)])
    old, new = submit(more)  # but what is not
    assert old == job
    wait_until(lambda: {"0 1", "1 1"} <= ledger(tmp_path).keys())
    assert some.record.state(slurm.live_jobs()).progress == "0 of 2, 2 running"
    last = f"{job}_1"  # it has the array's own number: by that, both would be requeued
    cluster.call("scancel", "--signal=USR1", last)
    wait_for_end([job, new])
    restarts = cluster.call("scontrol", "show", "job", job)
    assert restarts.count("Restarts=1") == 1, restarts
    counted = {f"{part} {item}": 1 for part in range(2) for item in range(8)}
    assert ledger(tmp_path) == counted | {f"2 {item}": 1 for item in range(3)}


def test_a_shard_that_waits_for_other_jobs_holds_no_node_and_goes_on_when_they_have_ended(
    cluster: Cluster, tmp_path: Path
) -> None:
    (other,) = submit(stage(tmp_path, [items_shard(tmp_path, 0, items=60, pause_s=1)]))
    waiting = Shard(function=waits, arguments=WaitsArguments(jobs=(other,)))
    root = tmp_path / "waits"
    some = ShardedStage(name="waits", root=root, shards=[waiting], cluster=SHARED)
    (job,) = submit(some)
    (folder,) = some.folders.values()
    wait_until(lambda: bool(folder.waits()[0]))
    wait_until(
        lambda: f"afterany:{other}" in cluster.call("squeue", "--format=%E", f"--jobs={job}")
    )
    wait_until(lambda: slurm.live_jobs()[job] == "PENDING")
    cluster.call("scancel", other)  # however it ends
    wait_for_end([job])
    some.check()
    assert (folder.output / "restarts").read_text() == "1"
    assert some.states()[0].failures == 0


def test_cancelling_takes_what_a_shard_waits_for_too(cluster: Cluster, tmp_path: Path) -> None:
    (other,) = submit(stage(tmp_path, [items_shard(tmp_path, 0, items=60, pause_s=1)]))
    waiting = Shard(function=waits, arguments=WaitsArguments(jobs=(other,)))
    root = tmp_path / "waits"
    some = ShardedStage(name="waits", root=root, shards=[waiting], cluster=SHARED)
    (job,) = submit(some)
    (folder,) = some.folders.values()
    wait_until(lambda: bool(folder.waits()[0]))
    wait_until(lambda: slurm.live_jobs()[job] == "PENDING")
    assert cancel([some.root]) == [job, other]
    wait_for_end([job, other])


def test_a_cancelled_array_stays_cancelled_and_can_be_run_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    some = stage(tmp_path, [items_shard(tmp_path, 0, items=4, pause_s=1)])
    (job,) = submit(some)
    wait_until(lambda: "0 0" in ledger(tmp_path))
    assert cancel([some.root]) == [job]
    wait_for_end([job])
    time.sleep(2)
    assert cluster.state(job) == "CANCELLED"
    assert some.record.state({}).status == "stopped"
    wait_for_end(submit(some))
    assert ledger(tmp_path) == {f"0 {item}": 1 for item in range(4)}


def test_each_model_a_shard_serves_is_a_step_that_ends_with_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    model = str(write_model_config(tmp_path / "model"))
    some = stage(tmp_path, [Shard(function=serve_two, arguments=ServeArguments(model=model))])
    wait_for_end(submit(some))
    some.check()
    [folder] = some.outputs
    seen = [(folder / name).read_text().split() for name in ("fusion.0", "judge.0", "fusion.1")]
    steps = [int(step) for _, step in seen]
    assert len(set(steps)) == 3
    assert min(steps) > 0  # the task's own is step 0
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid, _ in seen))
