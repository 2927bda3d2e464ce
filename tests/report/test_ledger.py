"""Costs by phase, curves, and several runs side by side."""

from pathlib import Path

import pytest

from megadistill.report.compare import outcomes, write_comparison
from megadistill.report.groups import unique_names
from megadistill.report.ledger import allocated_gpus, cost_ledger, ledger_table
from megadistill.rundir import WHOLE, RunDir
from tests.report.runs import make_run, measured, step_row, write_rollouts, write_rows
from tests.tiny import camopd_tree, make_config

TIMES = {"time/rollout": 1.0, "time/score": 2.0, "time/train": 3.0, "time/publish": 0.5}
COSTS = {**TIMES, "time/step": 7.0, "rollout/tokens": 80, "train/tokens": 90}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "tiny")


def test_costs_add_up_by_phase_and_teacher(run: RunDir) -> None:
    write_rows(
        run,
        [
            {"step": 0, "branch": "start", "time/evaluate": 4.0},
            step_row(1, "general", **COSTS),
            step_row(2, "domain", **COSTS),
            step_row(3, "general", **COSTS, **{"time/evaluate": 5.0}),
        ],
    )
    costs = cost_ledger(run, run.load_config())
    assert list(costs.index) == ["start", "general", "domain", "all"]
    assert list(costs.teacher) == ["-", "general", "domain", "-"]
    assert list(costs.steps) == [0, 2, 1, 3]
    assert costs["other s"]["general"] == pytest.approx(1.0)
    assert list(costs["total s"]) == pytest.approx([4.0, 2 * 7.0 + 5.0, 7.0, 4.0 + 3 * 7.0 + 5.0])
    assert costs["trained tokens per s"]["all"] == pytest.approx(30.0)
    shown = ledger_table(costs)
    assert shown.columns[0] == "phase"
    first, last = (dict(shown.iloc[at]) for at in (0, -1))
    assert (first["teacher"], first["rollout tokens per s"], first["save s"]) == ("-", "-", "-")
    assert (last["total s"], last["trained tokens"], last["GPU-hours"]) == ("30.0", "270", "-")


def test_a_run_without_steps_has_cost_nothing(run: RunDir) -> None:
    (row,) = ledger_table(cost_ledger(run, run.load_config())).to_dict("records")
    assert (row["phase"], row["steps"], row["total s"]) == ("all", "0", "0.0")


def test_sampling_that_was_hidden_counts_in_its_speed(run: RunDir) -> None:
    write_rows(run, [step_row(1, "general", **COSTS, **{"time/rollout_hidden": 3.0})])
    total = cost_ledger(run, run.load_config()).loc["all"]
    assert total["hidden rollout s"] == 3.0
    assert total["rollout tokens per s"] == pytest.approx(80 / 4.0)
    assert total["total s"] == pytest.approx(7.0)


def test_gpus_of_a_job() -> None:
    tree = camopd_tree(device="cuda", cluster={"nodes": 4, "gpus_per_node": 8})
    assert allocated_gpus(make_config(tree)) == 32
    assert allocated_gpus(make_config()) == 0


def test_saving_is_timed_by_the_files_of_the_kept_checkpoints(run: RunDir) -> None:
    write_rows(run, [step_row(step, "general", **COSTS) for step in (1, 2, 3, 4)])
    write_rollouts(run, 4)
    with run.writing_checkpoint(4) as directory:
        (directory / "part").write_text("x")
    total = cost_ledger(run, run.load_config()).loc["all"]
    assert (run.checkpoint(4) / WHOLE).exists()
    assert 0 <= total["save s"] < 60


def seeds(tmp_path: Path) -> list[RunDir]:
    """Two seeds of one experiment, and one of another."""
    runs = []
    for seed, (after, steps) in enumerate([(0.2, 4), (0.4, 4), (0.7, 5)]):
        run = make_run(
            tmp_path / f"run{seed}", camopd_tree(seed=seed, name=f"n{seed}", steps=steps)
        )
        first = {"step": 0, "branch": "start", **measured("general", 0.8, 0.6)}
        write_rows(run, [first, step_row(1, "general", **measured("general", after, 0.5))])
        runs.append(run)
    return runs


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path: Path) -> None:
    found = outcomes(seeds(tmp_path))
    reverse = found[found["nats per token"] == "student ‖ teacher"]
    assert reverse[["runs", "n", "after", "after less before"]].to_numpy().tolist() == [
        ["run0, run1", "2", "0.3000 ± 1.2706", "-0.5000 ± 1.2706"],
        ["run2", "1", "0.7000", "-0.1000"],
    ]


def test_the_comparison_shows_every_run(tmp_path: Path) -> None:
    page = write_comparison(seeds(tmp_path), tmp_path / "page.html").read_text()
    for text in ("3 runs", "run0, run1", "0.3000 ± 1.2706", "<svg", "default-src 'none'"):
        assert text in page
    assert "http://" not in page
    assert "https://" not in page


def test_runs_of_one_name_are_told_apart() -> None:
    runs = [RunDir(Path(name)) for name in ("/a/x", "/b/x", "/b/y")]
    assert unique_names(runs) == ["a/x", "b/x", "y"]
