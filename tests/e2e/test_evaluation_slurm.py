"""An evaluation whose answers and scores are arrays of a real Slurm, with a scripted endpoint."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.config import EvaluateConfig, dump, parse
from megadistill.launch.stages import read_jobs
from tests.e2e.local_slurm import Cluster, local_cluster, wait_until
from tests.evaluate.test_evaluation import medqa_row
from tests.inference.scripted import Endpoint, endpoint_tree

pytestmark = pytest.mark.slurm
STAGES = ("generate", "score", "result")
SHARED = {"exclusive": False, "cpus_per_node": 1, "time_minutes": 30, "signal_seconds": 60}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster() as started:
        yield started


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(answer)
    yield server
    server.stop()


@pytest.fixture
def config(tmp_path: Path, endpoint: Endpoint) -> Path:
    """An evaluation of eight questions in two shards."""
    file = tmp_path / "medqa.jsonl"
    file.write_text("".join(json.dumps(medqa_row(number)) + "\n" for number in range(8)))
    tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "systems": {"sys": endpoint_tree(endpoint.url)},
        "benchmarks": {"medqa": {"path": str(file)}},
        "shards": {"count": 2, "block": 2},
        "cluster": {"partition": "main", **SHARED},
    }
    config = tmp_path / "eval.yaml"
    config.write_text(dump(parse(EvaluateConfig, tree)))
    return config


def answer(number: int, body: dict[str, Any]) -> str:
    """Right about the first half of the questions."""
    found = int(re.findall(r"question (\d+) \?", body["messages"][-1]["content"])[-1])
    return f"Final answer: {'ABCD'[(found + (found >= 4)) % 4]}"


def megadistill(cluster: Cluster, *words: str) -> str:
    return cluster.call(sys.executable, "-m", "megadistill", *words)


def jobs_of(root: Path) -> dict[str, list[str]]:
    return {stage: list(read_jobs(root / "stages" / stage)) for stage in STAGES}


def wait_for_states(cluster: Cluster, root: Path, *states: str) -> None:
    """Until the stages are in these states."""

    def rows() -> list[str]:
        return megadistill(cluster, "status", str(root)).splitlines()[1:]

    def reached() -> bool:
        return [row.split()[1] for row in rows()[: len(STAGES)]] == list(states)

    wait_until(reached, lambda: "\n".join(rows()), every_s=2)


def test_the_job_script_submits_all_that_makes_a_table_and_then_has_nothing_to_do(
    cluster: Cluster, tmp_path: Path, config: Path, endpoint: Endpoint
) -> None:
    root = tmp_path / "runs" / "tiny"
    table = root / "report" / "table.md"
    for _ in range(2):
        job = cluster.call(
            "sbatch",
            "--parsable",
            "--cpus-per-task=1",
            f"--output={tmp_path}/job.log",
            "slurm/eval.sh",
            str(config),
        )
        cluster.wait_for_state(job, "COMPLETED", "FAILED")
        assert cluster.state(job) == "COMPLETED", (tmp_path / "job.log").read_text()
        # A second call finds all done, and makes the result itself.
        result = [] if table.exists() else ["done"]
        wait_for_states(cluster, root, "done", "done", *result)
    assert "| sys | 50.0 [" in table.read_text()
    assert "| sys | 50.0 [" in (tmp_path / "job.log").read_text()  # of the second: all was done
    assert len(endpoint.bodies) == 8
    assert {stage: len(jobs) for stage, jobs in jobs_of(root).items()} == dict.fromkeys(STAGES, 1)
    counts = {stage: len(list((root / "stages" / stage / "shards").iterdir())) for stage in STAGES}
    assert counts == {"generate": 2, "score": 1, "result": 1}


def test_what_vanished_is_submitted_again_by_the_job_that_makes_the_result(
    cluster: Cluster, tmp_path: Path, config: Path, endpoint: Endpoint
) -> None:
    root = tmp_path / "runs" / "tiny"
    endpoint.script = lambda number, body: 600.0  # it hangs
    printed = megadistill(cluster, "eval", "run", str(config))
    jobs = jobs_of(root)
    for stage, (job,) in jobs.items():
        assert f"{stage}: job {job}" in printed
    assert megadistill(cluster, "eval", "run", str(config)).count("job") == printed.count("job")
    assert jobs_of(root) == jobs  # they are under way: nothing is added
    wait_until(lambda: len(endpoint.bodies) >= 2)
    endpoint.script = answer
    cluster.call("scancel", *jobs["generate"])
    wait_for_states(cluster, root, "done", "done", "done")
    assert "| sys | 50.0 [" in (root / "report" / "table.md").read_text()
    again = jobs_of(root)
    assert {stage: len(some) for stage, some in again.items()} == {
        "generate": 2,
        "score": 2,
        "result": 1,
    }
    cluster.wait_for_state(*again["result"], "COMPLETED", "FAILED")
    assert cluster.state(*again["result"]) == "COMPLETED"


def test_a_failure_ends_what_needs_it_and_is_shown(
    cluster: Cluster, tmp_path: Path, config: Path, endpoint: Endpoint
) -> None:
    root = tmp_path / "runs" / "tiny"
    endpoint.script = lambda number, body: (401, "{}")
    megadistill(cluster, "eval", "run", str(config), "shards.tries=1")
    wait_for_states(cluster, root, "failed", "stopped", "failed")
    shown = megadistill(cluster, "campaign", "status", str(root))
    assert "0 of 2, 2 failed" in shown
    assert "models.sys: the endpoint answered 401" in " ".join(shown.split())
    endpoint.script = answer
    megadistill(cluster, "eval", "run", str(config), "--wait")
    assert "| sys | 50.0 [" in (root / "report" / "table.md").read_text()


def test_cancelling_takes_all_stages(
    cluster: Cluster, tmp_path: Path, config: Path, endpoint: Endpoint
) -> None:
    root = tmp_path / "runs" / "tiny"
    endpoint.script = lambda number, body: 600.0
    megadistill(cluster, "eval", "run", str(config))
    jobs = jobs_of(root)
    said = megadistill(cluster, "campaign", "cancel", str(root))
    cancelled = said.removeprefix("cancelled: ").split(", ")
    assert sorted(cancelled) == sorted(job for stage in STAGES for job in jobs[stage])
    wait_for_states(cluster, root, "stopped", "stopped", "stopped")


def test_a_campaigns_stage_is_done_when_the_evaluation_is(
    cluster: Cluster, tmp_path: Path, config: Path
) -> None:
    results = tmp_path / "runs" / "tiny" / "results" / "sys"
    tree = {
        "name": "small",
        "runs_dir": str(tmp_path / "runs"),
        "cluster": {"partition": "main", **SHARED},
        "stages": {
            "evaluate": {"verb": "eval", "config": str(config)},
            "compare": {
                "verb": "eval",
                "args": ["compare", str(results), f"--output={tmp_path}/compared"],
                "needs": ["evaluate"],
                "tries": 1,
            },
        },
    }
    file = tmp_path / "campaign.yaml"
    file.write_text(yaml.safe_dump(tree))
    megadistill(cluster, "campaign", str(file))
    campaign = tmp_path / "runs" / "small"
    [job] = read_jobs(campaign / "stages" / "evaluate")
    wait_until(lambda: (tmp_path / "runs" / "tiny" / "stages.json").exists())
    wait_until(lambda: "afterany:" in cluster.call("squeue", "--format=%E", f"--jobs={job}"))
    arrays = jobs_of(tmp_path / "runs" / "tiny")
    assert arrays["result"] == []  # the campaign's own job makes it
    wait_until(lambda: (tmp_path / "compared" / "table.md").exists(), every_s=1)
    restarts = cluster.call("scontrol", "show", "job", job)
    assert "Restarts=1" in restarts, restarts
    assert "| sys | " in (tmp_path / "compared" / "table.md").read_text()
