"""The whole run, as a user starts it: resumed after kills, and in other layouts."""

import math
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir, is_whole
from tests.e2e.local_slurm import local_cluster
from tests.e2e.small_run import (
    finish,
    kill_when,
    losses,
    make_models,
    start,
    train_command,
    write_run,
)

pytestmark = [pytest.mark.vllm, pytest.mark.megatron, pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("e2e")
    make_models(directory)
    return directory


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunDir:
    """A run that nothing disturbed, in one trainer process."""
    kept = {"every": 1, "keep": 2, "export_every": 2}
    finish(start(train_command(write_run(folder, "undisturbed", checkpoint=kept))))
    return RunDir(folder / "runs" / "undisturbed")


@pytest.mark.timeout(600)
def test_a_run_leaves_curves_rollouts_and_a_student_that_loads(undisturbed: RunDir) -> None:
    rows = read_metrics(undisturbed.metrics_file)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["branch"] for row in rows[1:]] == ["general", "domain", "general", "domain"]
    assert all(math.isfinite(row["loss"]) for row in rows[1:])
    assert [step for step, _ in undisturbed.whole_checkpoints()] == [3, 4]
    rollouts = pq.read_table(undisturbed.rollout_file(3)).to_pylist()
    assert len(rollouts) == 4
    assert {row["policy_version"] for row in rollouts} == {2}
    assert any(row["selected"] for row in rollouts)
    student = AutoModelForCausalLM.from_pretrained(undisturbed.export)
    before = AutoModelForCausalLM.from_pretrained(undisturbed.step_export(2))
    assert student.num_parameters() == before.num_parameters() > 0
    assert not torch.equal(student.lm_head.weight, before.lm_head.weight)
    assert undisturbed.read_progress()["done"]


@pytest.mark.timeout(1800)
def test_three_kills_change_nothing(folder: Path, undisturbed: RunDir) -> None:
    config = write_run(folder, "killed")
    run = RunDir(folder / "runs" / "killed")

    def logged() -> int:
        return len(read_metrics(run.metrics_file))

    # While it samples for step 2: the checkpoint before is whole, no weights have come of it.
    kill_when(start(train_command(config)), lambda: is_whole(run.checkpoint(1)))
    assert not (run.weights / "version-000002").exists()
    # While it publishes what step 2 made: the files are there, the step is not logged yet.
    kill_when(start(train_command(config)), (run.weights / "version-000002").exists)
    assert logged() == 2
    # While it writes the checkpoint of step 3.
    kill_when(start(train_command(config)), run.checkpoint(3).exists)
    assert logged() == 4
    assert not is_whole(run.checkpoint(3))
    finish(start(train_command(config)))
    assert losses(run) == losses(undisturbed)
    last = [
        read_metrics(r.metrics_file)[-1]["heldout/general/reverse_kl"] for r in (run, undisturbed)
    ]
    assert last[0] == last[1]


@pytest.mark.timeout(900)
def test_a_finished_run_goes_on_with_more_steps_on_another_layout(
    folder: Path, undisturbed: RunDir
) -> None:
    config = write_run(folder, "longer")
    run = RunDir(folder / "runs" / "longer")
    finish(start([*train_command(config), "steps=2"]))
    output = finish(start([*train_command(run.path), "steps=3", "parallel.dp=2"]))
    assert "HTTP Request" not in output  # the log is for people
    found, expected = losses(run), losses(undisturbed)[:3]
    assert found[:2] == expected[:2]
    assert found[2] == pytest.approx(expected[2], rel=1e-3)
    assert run.step_export(2).is_dir()
    assert run.export.is_dir()
    assert len(list((run.path / "logs").glob("trainer-1.*"))) == 1


@pytest.mark.timeout(900)
def test_a_kill_changes_nothing_where_two_ranks_train_in_bf16_on_rollouts_sampled_ahead(
    folder: Path,
) -> None:
    """The checkpoint is whole, and holds the rollouts that step 2 was to train on."""
    changes = {
        "precision": "bf16",
        "parallel": {"dp": 2},
        "rollout": {"max_tokens": 8, "max_num_seqs": 8, "max_staleness": 1},
        "evaluate": {"every": 0},
        "checks": {"max_mean_log_ratio": 0.2, "max_masked_fraction": 0.2},
        "steps": 3,
    }
    runs = {name: write_run(folder, name, **changes) for name in ("ahead", "ahead-killed")}
    found = {name: RunDir(folder / "runs" / name) for name in runs}
    checkpoint = found["ahead-killed"].checkpoint(1)
    kill_when(start(train_command(runs["ahead-killed"])), lambda: is_whole(checkpoint))
    for config in runs.values():
        finish(start(train_command(config)))
    assert len(losses(found["ahead"])) == 3
    assert losses(found["ahead"]) == losses(found["ahead-killed"])


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_slurm_job_on_four_nodes_gives_the_losses_of_one_process(
    folder: Path, undisturbed: RunDir
) -> None:
    config = write_run(folder, "parallel", parallel={"pp": 2, "dp": 2})
    run = RunDir(folder / "runs" / "parallel")
    with local_cluster(MEGADISTILL_PYTHON=sys.executable) as cluster:
        job = cluster.call(
            *("sbatch", "--parsable", f"--output={folder}/job.log"),
            *("slurm/camopd_medical.sh", str(config)),
        )
        cluster.wait_for_state(job, "COMPLETED", "FAILED", patience_s=800)
        assert cluster.state(job) == "COMPLETED", (folder / "job.log").read_text()[-4000:]
    assert len(list((run.path / "logs").glob("trainer-*"))) == 4
    found, expected = losses(run), losses(undisturbed)
    assert len(found) == len(expected) == 4
    for (step, loss, norm), (_, expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-6), step
        assert norm == pytest.approx(expected_norm, rel=1e-3), step
