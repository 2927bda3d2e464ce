"""The fault matrix: whatever befalls a real job, its steps and weights are the undisturbed ones.

One job takes all faults in turn. MEGADISTILL_FAULTS names some of them, with commas between;
MEGADISTILL_FAULTS_TABLE is a file for a table of what each has cost, in Markdown.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from megadistill.rundir import RunDir
from tests.e2e.faults import (
    FAULTS,
    Disturbed,
    Outcome,
    let_finish,
    run_undisturbed,
    same_rows,
    same_weights,
    small_disk,
    submit_command,
    suffer,
    write_config,
)
from tests.e2e.local_slurm import Cluster, local_cluster
from tests.e2e.small_run import finish, losses, make_models, start

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.multi,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

CHOSEN = [name for name in os.environ.get("MEGADISTILL_FAULTS", "").split(",") if name]


@dataclass
class World:
    """The cluster, the run that suffers, and what has been done to it."""

    folder: Path
    cluster: Cluster
    disturbed: Disturbed
    disk: bool
    """Whether the run directory is on a disk of its own, which can be filled."""
    outcomes: list[Outcome] = field(default_factory=list)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("faults")
    make_models(folder)
    with small_disk(folder / "disk") as disk, local_cluster(MEGADISTILL_PYTHON=sys.executable) as c:
        world = World(folder, c, Disturbed(cluster=c, folder=folder), disk)
        world.disturbed.submit()
        world.disturbed.reach(2)
        yield world
        c.call("scancel", "--quiet", world.disturbed.job)
    write_table(world.outcomes)


def write_table(outcomes: list[Outcome]) -> None:
    lines = ["| fault | at step | starts | seconds to a new step |", "| --- | --- | --- | --- |"]
    lines += [
        "| {fault} | {step} | {attempts} | {seconds:.0f} |".format(**asdict(outcome))
        for outcome in outcomes
    ]
    if file := os.environ.get("MEGADISTILL_FAULTS_TABLE"):
        Path(file).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("fault", CHOSEN or FAULTS)
def test_the_run_goes_on_after(world: World, fault: str) -> None:
    if fault == "disk full" and not world.disk:
        pytest.skip("may not mount a small file system")
    world.outcomes.append(suffer(world.disturbed, fault))


@pytest.fixture(scope="module")
def undisturbed(world: World) -> RunDir:
    """The run of as many steps that nothing befell, through `megadistill train`."""
    return run_undisturbed(world.folder, let_finish(world.disturbed))


def test_every_step_is_the_undisturbed_one(world: World, undisturbed: RunDir) -> None:
    assert same_rows(world.disturbed, losses(undisturbed))


def test_the_weights_in_the_end_are_the_undisturbed_ones(world: World, undisturbed: RunDir) -> None:
    assert same_weights(world.disturbed.run, undisturbed)


def test_submitit_gives_the_losses_of_train(
    world: World, undisturbed: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in world.cluster.environment.items():
        monkeypatch.setenv(name, value)
    said = finish(start(submit_command(write_config(world.folder, "submitted", steps=2))))
    job = said.split("job ", 1)[1].split(",")[0]
    world.cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert losses(RunDir(world.folder / "runs" / "submitted")) == losses(undisturbed)[:2]
