"""A refinement whose stages are dependent arrays of a real Slurm, against the same one run here.

The shards of the jobs are processes of their own; a `sitecustomize` gives them the scripted engine and
encoder, and the endpoint that fuses and judges is in this process.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megadistill.config import RefineConfig, dump, parse
from megadistill.launch.stages import read_jobs
from tests.e2e.local_slurm import ROOT, Cluster, local_cluster, wait_until
from tests.inference.scripted import Endpoint, endpoint_tree
from tests.refine.test_pipeline import good_model
from tests.refine.world import PAIRS, World, echo_or_stray, make_world

pytestmark = pytest.mark.slurm
STAGES = ("rewrite", "filter", "fusion", "result")
SHARED = {"exclusive": False, "cpus_per_node": 1, "time_minutes": 30, "signal_seconds": 60}
SCRIPTED = """
import sys
if sys.orig_argv[-2:-1] == ["shard"] and "/stages/result/" not in sys.orig_argv[-1]:
    from megadistill.data.tokenizer import load_tokenizer
    from megadistill.refine import rewriting, similarity
    from tests.inference.scripted import ScriptedEngine
    from tests.refine.world import WordEncoder, echo_or_stray
    def start(given):
        return ScriptedEngine(load_tokenizer(given.model), echo_or_stray)
    rewriting.start_batch_engine = start
    similarity.SentenceEncoder = WordEncoder
"""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(good_model)
    yield server
    server.stop()


@pytest.fixture
def world(tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> World:
    """Ten answers, of which two are rewritten astray and stay as they were."""
    (tmp_path / "here").mkdir()
    world = make_world(
        tmp_path / "here",
        monkeypatch,
        [*PAIRS, "nothing of the sort"],
        models={"strong": endpoint_tree(endpoint.url, concurrency=1)},
        fusion={"model": "strong", "judges": ["strong"]},
    )
    world.engine.reply = echo_or_stray
    return world


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SCRIPTED)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    with local_cluster(PYTHONPATH=path) as started:
        yield started


def made(root: Path) -> dict[str, object]:
    """The result, without where and when it was made."""
    summary = json.loads((root / "summary.json").read_text())
    return {
        "refined": [json.loads(line) for line in (root / "refined.jsonl").open()],
        "provenance": pq.read_table(root / "provenance.parquet").to_pylist(),
        "decisions": summary["decisions"],
        "similarity": summary["similarity"],
    }


def test_a_refinement_on_slurm_makes_what_it_makes_here(
    cluster: Cluster, world: World, endpoint: Endpoint
) -> None:
    world.run()
    here, asked = made(world.root), len(endpoint.bodies)
    assert here["decisions"] == {"fused": 8, "original": 2}
    tree = world.tree | {"name": "jobs", "cluster": {"partition": "main", **SHARED}}
    config = world.path / "refine.yaml"
    config.write_text(dump(parse(RefineConfig, tree)))
    root = world.path / "runs" / "jobs"
    command = (sys.executable, "-m", "megadistill")
    printed = cluster.call(*command, "refine", str(config))
    jobs = {stage: list(read_jobs(root / "stages" / stage)) for stage in STAGES}
    assert printed.splitlines() == [
        *(f"{stage}: job {job}" for stage, (job,) in jobs.items()),
        f"follow it with: megadistill status {root}",
    ]
    waits = cluster.call("squeue", "--noheader", "--format=%F %E")
    for (before,), (job,) in zip(list(jobs.values())[:-1], list(jobs.values())[1:], strict=True):
        assert any(
            line.startswith(f"{job} ") and f":{before}" in line for line in waits.splitlines()
        ), waits
    wait_until((root / "summary.json").exists, lambda: cluster.call(*command, "status", str(root)))
    assert made(root) == here
    assert len(endpoint.bodies) == 2 * asked
    counts = {stage: len(list((root / "stages" / stage / "shards").iterdir())) for stage in STAGES}
    assert counts == {"rewrite": 2, "filter": 2, "fusion": 1, "result": 1}
    wait_until(lambda: not cluster.call("squeue", "--noheader"))
    assert cluster.state(*jobs["result"]) == "COMPLETED"
    again = cluster.call(*command, "refine", str(config))
    assert ": job " not in again
    assert len(endpoint.bodies) == 2 * asked  # all was done
