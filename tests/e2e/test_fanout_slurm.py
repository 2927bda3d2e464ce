"""Arrays of shards on a real Slurm of four nodes, as the library's user starts them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megadistill.config.cluster import ClusterConfig
from megadistill.launch import fanout, slurm
from megadistill.launch.fanout import Limits, run_fanout, submit_fanout
from megadistill.launch.shards import Shard
from tests.e2e.local_slurm import ROOT, Cluster, local_cluster, wait_until
from tests.inference import serving_shard
from tests.launch.test_fanout import items_shard, ledger
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
        patch.setattr(fanout, "WAIT_POLL_S", 0.5)
        patch.setattr(slurm, "WAIT_POLL_S", 0.5)
        yield started


def test_of_eight_shards_two_fail_once_and_nothing_is_done_twice(
    cluster: Cluster, tmp_path: Path
) -> None:
    troubles: dict[int, dict[str, Any]] = {
        2: {"fail_once_after": 1},
        5: {"fail_once_after": 2, "how": "kill"},
    }
    shards = [items_shard(tmp_path, part, **troubles.get(part, {})) for part in range(8)]
    limits = Limits(concurrency=4)
    result = run_fanout(tmp_path / "fanout", shards, limits, cluster=SHARED)
    result.check()
    assert [shard.failures for shard in result.shards] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert ledger(tmp_path) == {f"{part} {item}": 1 for part in range(8) for item in range(3)}
    jobs = fanout.read_jobs(tmp_path / "fanout")
    assert len(jobs) == 1
    run_fanout(tmp_path / "fanout", shards, limits, cluster=SHARED).check()
    assert fanout.read_jobs(tmp_path / "fanout") == jobs  # all is done: nothing was submitted


def test_a_warned_shard_is_requeued_alone_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    shards = [items_shard(tmp_path, part, items=8, pause_s=0.5) for part in range(2)]
    job = submit_fanout(tmp_path / "fanout", shards, cluster=SHARED)
    assert job is not None
    with pytest.raises(ValueError, match=f"found job {job} of this fan-out in the queue"):
        submit_fanout(tmp_path / "fanout", shards, cluster=SHARED)
    wait_until(lambda: {"0 1", "1 1"} <= ledger(tmp_path).keys())
    last = f"{job}_1"  # it has the array's own number: by that, both would be requeued
    cluster.call("scancel", "--signal=USR1", last)
    wait_until(lambda: "1 7" in ledger(tmp_path) and job not in slurm.live_jobs())
    restarts = cluster.call("scontrol", "show", "job", job)
    assert restarts.count("Restarts=1") == 1, restarts
    assert ledger(tmp_path) == {f"{part} {item}": 1 for part in range(2) for item in range(8)}


def test_a_cancelled_array_stays_cancelled_and_can_be_run_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    shards = [items_shard(tmp_path, 0, items=4, pause_s=1)]
    job = submit_fanout(tmp_path / "fanout", shards, cluster=SHARED)
    assert job is not None
    wait_until(lambda: "0 0" in ledger(tmp_path))
    cluster.call("scancel", job)
    wait_until(lambda: job not in slurm.live_jobs())
    time.sleep(2)
    assert cluster.state(job) == "CANCELLED"
    run_fanout(tmp_path / "fanout", shards, cluster=SHARED).check()
    assert ledger(tmp_path) == {f"0 {item}": 1 for item in range(4)}


def test_each_model_a_shard_serves_is_a_step_that_ends_with_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    model = write_model_config(tmp_path / "model")
    shard = Shard(
        entry=f"{serving_shard.__name__}:serve_two", arguments={"model": str(model)}, label="serve"
    )
    result = run_fanout(tmp_path / "fanout", [shard], cluster=SHARED)
    result.check()
    [folder] = result.directories
    seen = [(folder / name).read_text().split() for name in ("fusion.0", "judge.0", "fusion.1")]
    steps = [int(step) for _, step in seen]
    assert len(set(steps)) == 3
    assert min(steps) > 0  # the task's own is step 0
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid, _ in seen))
