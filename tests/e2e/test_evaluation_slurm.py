"""An evaluation whose answers and scores are arrays of a real Slurm, with a scripted endpoint."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megadistill.config import EvaluateConfig, dump, parse
from megadistill.launch.stages import read_jobs
from tests.e2e.local_slurm import Cluster, local_cluster
from tests.evaluate.test_evaluation import medqa_row
from tests.inference.scripted import Endpoint, endpoint_tree

pytestmark = pytest.mark.slurm
SHARED = {"exclusive": False, "cpus_per_node": 1, "time_minutes": 30, "signal_seconds": 60}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster() as started:
        yield started


def answer(number: int, body: dict[str, Any]) -> str:
    """Right about the first half of the questions."""
    found = int(re.findall(r"question (\d+) \?", body["messages"][-1]["content"])[-1])
    return f"Final answer: {'ABCD'[(found + (found >= 4)) % 4]}"


def test_the_job_script_makes_a_table_by_arrays_and_then_has_nothing_to_do(
    cluster: Cluster, tmp_path: Path
) -> None:
    file = tmp_path / "medqa.jsonl"
    file.write_text("".join(json.dumps(medqa_row(number)) + "\n" for number in range(8)))
    endpoint = Endpoint(answer)
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
    root = tmp_path / "runs" / "tiny"
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
    assert "| sys | 50.0 [" in (root / "report" / "table.md").read_text()
    assert len(endpoint.bodies) == 8
    for stage, tasks in (("generate", 2), ("score", 1)):
        jobs = read_jobs(root / "stages" / stage)
        assert len(jobs) == 1
        assert len(list((root / "stages" / stage / "shards").iterdir())) == tasks
    endpoint.stop()
