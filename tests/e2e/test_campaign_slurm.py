"""A campaign on a real Slurm of four nodes: an array between single jobs, and a run of fakes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megadistill.launch import gang
from megadistill.launch.campaign import Campaign
from megadistill.launch.node import open_run
from megadistill.launch.staged_work import cancel, read_states
from megadistill.launch.stages import read_jobs
from tests.e2e.local_slurm import ROOT, Cluster, local_cluster, wait_until
from tests.launch.configs import settings
from tests.launch.fake_node import fake_task
from tests.launch.test_campaign import counts, make_crashing_site, write_campaign

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        patch.setenv("PATH", os.environ["PATH"])  # submission may put a stand-in on it
        patch.chdir(ROOT)
        patch.setattr(gang, "node_task", fake_task)
        yield started


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in make_crashing_site(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def statuses(campaign: Campaign) -> dict[str, str]:
    return {state.name: state.status for state in read_states(campaign.root)}


def wait_for_end(campaign: Campaign) -> None:
    wait_until(
        lambda: not {"running", "queued"} & set(statuses(campaign).values()),
        lambda: str(read_states(campaign.root)),
    )


def with_train_stage(file: Path) -> Path:
    """The small campaign, its last stage waiting for a train stage, too."""
    tree = yaml.safe_load(file.read_text())
    run = file.with_name("train.yaml")
    run.write_text(
        yaml.safe_dump(
            settings(
                runs_dir=str(file.parent / "runs"),
                parallel={"dp": 2},
                cluster={"nodes": 2, "exclusive": False, "cpus_per_node": 1},
            )
        )
    )
    tree["stages"]["train"] = {"verb": "train", "config": str(run), "needs": ["prepare"]}
    tree["stages"]["last"]["needs"] = ["parts", "train"]
    file.write_text(yaml.safe_dump(tree))
    return file


def test_an_array_of_eight_of_which_two_fail_once_does_nothing_twice(folder: Path) -> None:
    campaign = Campaign.load(with_train_stage(write_campaign(folder)))
    jobs = campaign.submit()
    assert list(jobs) == ["prepare", "parts", "train", "last"]
    assert set(statuses(campaign).values()) <= {"queued", "running", "done"}
    assert campaign.submit().items() <= jobs.items()  # they are under way: nothing is added
    wait_for_end(campaign)
    assert set(statuses(campaign).values()) == {"done"}, read_states(campaign.root)
    once = {f"part-{part}": 1 for part in range(8)} | {"run": 1}
    assert counts(folder) == once
    assert campaign.submit() == {}
    again = Campaign.load(campaign.root)
    assert again.submit() == {}
    assert counts(folder) == once


def test_a_failure_cancels_what_needs_it_and_resuming_does_only_what_is_left(
    folder: Path, cluster: Cluster
) -> None:
    config = write_campaign(folder)
    missing = folder / "part-4.yaml"
    text = missing.read_text()
    missing.unlink()
    campaign = Campaign.load(config, ["stages.parts.tries=2"])
    jobs = campaign.submit()
    wait_for_end(campaign)
    found = {state.name: state for state in read_states(campaign.root)}
    assert [found[name].status for name in jobs] == ["done", "failed", "stopped"]
    assert found["parts"].progress == "7 of 8, 1 failed"
    assert "part-4.yaml: no such file" in found["parts"].detail
    missing.write_text(text)
    before = counts(folder)
    resumed = Campaign.load(campaign.root)
    assert list(resumed.submit()) == ["parts", "last"]
    wait_for_end(resumed)
    assert set(statuses(resumed).values()) == {"done"}
    new = {name: count - before.get(name, 0) for name, count in counts(folder).items()}
    assert {name: count for name, count in new.items() if count} == {"part-4": 1, "run": 1}


def test_cancelling_takes_what_is_in_the_queue(folder: Path, cluster: Cluster) -> None:
    campaign = Campaign.load(write_campaign(folder), ["cluster.nodes=1", "cluster.qos=null"])
    jobs = campaign.submit()
    cancelled = cancel([stage.root for stage in campaign.stages.values()])
    assert set(cancelled) <= {job for some in jobs.values() for job in some}
    assert set(jobs["last"]) <= set(cancelled)
    wait_for_end(campaign)
    assert statuses(campaign)["last"] == "stopped"
    assert list(read_jobs(campaign.stages["last"].root)) == jobs["last"]


def test_every_export_starts_an_array_that_the_run_does_not_wait_for(
    folder: Path, cluster: Cluster
) -> None:
    run_dir = folder / "runs" / "launch"
    work = {
        "verb": "config",
        "args": ["check", f"{folder}/part-{{shard}}.yaml", "{export}/config-{step}.yaml"],
        "array": 2,
        "resources": {"exclusive": False, "nodes": 1},
    }
    write_campaign(folder)  # for its parts
    tree = settings(
        runs_dir=str(folder / "runs"),
        cluster={"nodes": 2, "cpus_per_node": 1, "exclusive": False},
        checkpoint={"on_export": work},
    )
    (folder / "train.yaml").write_text(yaml.safe_dump(tree))
    for name, step in (("exports/step-000002", 2), ("export", 3)):
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / f"config-{step}.yaml").write_text(yaml.safe_dump(settings()))
    config, run = open_run(folder / "train.yaml", ())
    job = gang.submit_gang(config, run).job_id
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert cluster.state(job) == "COMPLETED"
    log = (run.path / "logs" / "on_export.log").read_text()
    assert log.count(": job ") == 2, log
    evaluations = [run.path / "evaluations" / name for name in ("step-000002", "final")]
    wait_until(
        lambda: all(len(list(path.glob("shards/*/done.json"))) == 2 for path in evaluations),
        lambda: str([file.read_text() for file in run.path.glob("evaluations/**/try-*.log")]),
        patience_s=90,
    )


def test_an_evaluation_that_cannot_be_submitted_is_no_failure_of_the_run(
    folder: Path, cluster: Cluster
) -> None:
    work = {"verb": "eval", "resources": {"partition": "nowhere"}}
    tree = settings(runs_dir=str(folder / "runs"), checkpoint={"on_export": work})
    (folder / "train.yaml").write_text(yaml.safe_dump(tree))
    (folder / "runs" / "launch" / "export").mkdir(parents=True)
    config, run = open_run(folder / "train.yaml", ())
    job = gang.submit_gang(config, run).job_id
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert cluster.state(job) == "COMPLETED"
    log = (run.path / "logs" / "on_export.log").read_text()
    assert "could not be submitted" in log
    assert "invalid partition specified: nowhere" in log
