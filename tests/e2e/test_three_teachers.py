"""Three branches with three teachers, one of another size: on Slurm, and resumed after kills."""

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.metrics import read_metrics
from megadistill.report.page import write_page
from megadistill.rundir import RunDir, is_whole
from tests.e2e.local_slurm import local_cluster
from tests.e2e.small_run import (
    finish,
    kill_when,
    losses,
    make_model,
    make_models,
    save_model,
    start,
    train_command,
    write_prompts,
    write_run,
)
from tests.tiny import Tree

pytestmark = [pytest.mark.vllm, pytest.mark.megatron, pytest.mark.multi, pytest.mark.slow]

BRANCHES = ("general", "medical", "law")
NUM_STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("three")
    make_models(directory)
    torch.manual_seed(1)
    save_model(make_model(hidden_size=96, num_layers=2), directory / "law")
    write_prompts(directory / "law.jsonl", 100)
    return directory


def write_family(folder: Path, name: str) -> Path:
    """JSD over every id, shares that are found anew at every step, two responses a prompt."""
    teachers = {"general": "general", "medical": "domain", "law": "law"}
    branches: Tree = {
        name: {"pool": name, "teacher": teacher, "role": "preserve", "mass": 0.9}
        for name, teacher in teachers.items()
    }
    branches["general"] |= {"role": "recover", "scale": 2.0}
    return write_run(
        folder,
        name,
        steps=NUM_STEPS,
        teachers={name: {"path": str(folder / name)} for name in teachers.values()},
        algorithm={
            "kind": "mopd",
            "branches": branches,
            "schedule": {
                "kind": "velocity",
                "every": 1,
                "first": 1,
                "temperature": 0.1,
                "floor": 0.2,
            },
            "loss": {"kind": "jsd", "beta": 0.5},
        },
        data={
            "max_prompt_tokens": 64,
            "heldout_fraction": 0.2,
            "pools": {
                pool: {"sources": [{"kind": "file", "path": str(folder / f"{pool}.jsonl")}]}
                for pool in BRANCHES
            },
        },
        batch={"size": 6, "responses": 2, "micro_batch_tokens": 64},
        parallel={"dp": 2},
        evaluate={"every": 0},
    )


@pytest.fixture(scope="module")
def on_slurm(folder: Path) -> RunDir:
    config = write_family(folder, "slurm")
    with local_cluster(MEGADISTILL_PYTHON=sys.executable) as cluster:
        job = cluster.call(
            *("sbatch", "--parsable", f"--output={folder}/job.log"),
            *("slurm/camopd_medical.sh", str(config)),
        )
        cluster.wait_for_state(job, "COMPLETED", "FAILED", patience_s=800)
        assert cluster.state(job) == "COMPLETED", (folder / "job.log").read_text()[-4000:]
    return RunDir(folder / "runs" / "slurm")


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_three_teachers_train_and_export_on_slurm(on_slurm: RunDir) -> None:
    rows = read_metrics(on_slurm.metrics_file)[1:]
    assert len(rows) == NUM_STEPS
    for row in rows:
        assert sorted(row["branch"].split("+")) == sorted(BRANCHES)
        shares = [row[f"{name}/token_share"] for name in BRANCHES]
        assert sum(shares) == pytest.approx(1)
        assert row["divergence"] > 0
        assert sum(row[f"{name}/schedule_share"] for name in BRANCHES) == pytest.approx(1)
    prompts: set[tuple[int, ...]] = set()
    for step in range(1, NUM_STEPS + 1):
        found = pq.read_table(on_slurm.rollout_file(step)).to_pylist()
        assert len(found) == 12
        ids = [row["prompt_id"] for row in found]
        assert ids[::2] == ids[1::2]
        counts = Counter(row["branch"] for row in found)
        prompts.add(tuple(counts[name] for name in BRANCHES))
    assert len(prompts) > 1  # the shares have moved
    student = AutoModelForCausalLM.from_pretrained(on_slurm.export)
    assert student.config.hidden_size == 64


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_page_shows_all_three(on_slurm: RunDir, tmp_path: Path) -> None:
    write_page(on_slurm, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert all(name in text for name in BRANCHES)


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_kills_change_neither_draws_nor_losses(folder: Path, on_slurm: RunDir) -> None:
    config = write_family(folder, "killed")
    run = RunDir(folder / "runs" / "killed")
    for step in range(1, NUM_STEPS):
        kill_when(start(train_command(config)), partial(is_whole, run.checkpoint(step)))
    finish(start(train_command(config)))
    assert losses(run) == losses(on_slurm)
    assert draws(run) == draws(on_slurm)


def draws(run: RunDir) -> list[list[tuple[str, str, float]]]:
    """(branch, prompt, score) of every rollout of every step."""
    tables = [pq.read_table(run.rollout_file(step)) for step in range(1, NUM_STEPS + 1)]
    return [
        [(row["branch"], row["prompt_id"], row["score"]) for row in table.to_pylist()]
        for table in tables
    ]
