"""The fault matrix: whatever befalls a real job, its steps and weights are the undisturbed ones.

One job takes all faults in turn. CI takes the first of the table; all of it, and a table in Markdown,
with MEGADISTILL_FAULTS=all or some names with commas between (file: MEGADISTILL_FAULTS_TABLE).
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
    Row,
    check_rows,
    same_weights,
    small_disk,
    submit_command,
    suffer,
)
from tests.e2e.local_slurm import Cluster, local_cluster
from tests.e2e.small_run import (
    finish,
    losses,
    make_models,
    start,
    train_command,
    write_run,
)

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.multi,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

CI_FAULTS = 4
WANTED = os.environ.get("MEGADISTILL_FAULTS", ",".join(list(FAULTS)[:CI_FAULTS]))
CHOSEN = list(FAULTS) if WANTED == "all" else WANTED.split(",")
STEPS = 4 + 4 * len(CHOSEN)
"""The run goes on for a step or two while a fault is prepared."""


@dataclass
class World:
    """The cluster, the undisturbed run, and the one that suffers."""

    folder: Path
    cluster: Cluster
    undisturbed: RunDir
    disturbed: Disturbed
    outcomes: list[Outcome] = field(default_factory=list)
    disk: bool = False

    def expected(self) -> list[Row]:
        return losses(self.undisturbed)


def write(folder: Path, name: str, steps: int = STEPS, disk: str = "runs") -> Path:
    return write_run(
        folder,
        name,
        steps=steps,
        runs_dir=str(folder / disk),
        parallel={"dp": 2},
        evaluate={"every": 0},
        cluster={"nodes": 2, "cpus_per_node": 1, "max_attempts": 100, "time_minutes": 60},
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("faults")
    make_models(folder)
    finish(start(train_command(write(folder, "undisturbed"))))
    with small_disk(folder / "disk") as disk, local_cluster(MEGADISTILL_PYTHON=sys.executable) as c:
        disturbed = Disturbed(
            cluster=c,
            run=RunDir(folder / "disk" / "disturbed"),
            config=write(folder, "disturbed", disk="disk"),
            log=folder / "job.log",
        )
        disturbed.submit()
        undisturbed = RunDir(folder / "runs" / "undisturbed")
        world = World(folder, c, undisturbed, disturbed, disk=disk)
        yield world
        c.call("scancel", "--quiet", disturbed.job)
    write_table(world.outcomes)


def write_table(outcomes: list[Outcome]) -> None:
    lines = ["| fault | at step | starts | seconds to a new step |", "| --- | --- | --- | --- |"]
    lines += [
        "| {fault} | {step} | {attempts} | {seconds:.0f} |".format(**asdict(outcome))
        for outcome in outcomes
    ]
    if file := os.environ.get("MEGADISTILL_FAULTS_TABLE"):
        Path(file).write_text("\n".join(lines) + "\n")


def test_sbatch_gives_the_losses_of_train(world: World) -> None:
    world.disturbed.reach(2)
    check_rows(world.disturbed, world.expected())


@pytest.mark.parametrize("fault", CHOSEN)
def test_a_fault_changes_no_step(world: World, fault: str) -> None:
    if fault == "disk full" and not world.disk:
        pytest.skip("may not mount a small file system")
    world.outcomes.append(suffer(world.disturbed, fault))
    check_rows(world.disturbed, world.expected())


def test_the_weights_in_the_end_are_the_undisturbed_ones(world: World) -> None:
    world.disturbed.cluster.wait_for_state(world.disturbed.job, "COMPLETED", "FAILED")
    assert world.disturbed.state() == "COMPLETED", world.disturbed.tail()
    check_rows(world.disturbed, world.expected())
    assert world.disturbed.rows()[-1] == world.expected()[-1]
    assert same_weights(world.disturbed.run, world.undisturbed)


def test_submitit_gives_the_losses_of_train(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in world.cluster.environment.items():
        monkeypatch.setenv(name, value)
    said = finish(start(submit_command(write(world.folder, "submitted", steps=2))))
    job = said.split("job ", 1)[1].split(",")[0]
    world.cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert losses(RunDir(world.folder / "runs" / "submitted")) == world.expected()[:2]
