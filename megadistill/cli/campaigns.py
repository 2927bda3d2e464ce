"""Verbs of a campaign: stages of different sizes as dependent jobs."""

import shutil
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from megadistill.cli.verbs import Overrides, Source, check_words, family, verb

campaign = family(
    "campaign",
    "Stages as dependent Slurm jobs. `campaign CONFIG` is short for `campaign submit CONFIG`.",
    example="campaign configs/campaign/embedded_table.yaml",
    implied=True,
)

Directory = Annotated[str, Argument(metavar="DIR", help="the campaign's, RUNS/NAME")]
Local = Annotated[bool, Option("--local", help="Run the stages here, also where there is Slurm.")]


@verb(campaign, example="campaign submit configs/campaign/embedded_table.yaml")
def submit(config: Source, overrides: Overrides = None, local: Local = False) -> int:
    """Submit what is not done of a campaign; without Slurm, run it here."""
    from megadistill.launch.campaign import Campaign

    chosen = Campaign.load(config, overrides or ())
    for name, commands in chosen.commands().items():
        for words in commands:
            check_words(f"stages.{name}", words)
    if local or shutil.which("sbatch") is None:
        return 0 if chosen.run_here() else 1
    chosen.submit()
    print(f"follow it with: megadistill campaign status {chosen.root}")
    return 0


@verb(campaign, example="campaign resume runs/embedded_table")
def resume(directory: Directory, overrides: Overrides = None, local: Local = False) -> int:
    """Submit again what is neither done nor in the queue."""
    return submit(directory, overrides, local)


@verb(campaign, example="campaign status runs/embedded_table")
def status(directory: Directory) -> None:
    """What each stage has done, and its last trouble. Also of a refinement or an evaluation."""
    from rich.console import Console

    from megadistill.launch import staged_work

    staged_work.show(Path(directory).absolute(), Console())


@verb(campaign, example="campaign cancel runs/embedded_table")
def cancel(directory: Directory) -> None:
    """Cancel what is in the queue. Also of a refinement or an evaluation."""
    from megadistill.launch import staged_work

    plan = staged_work.read_plan(Path(directory).absolute())
    jobs = staged_work.cancel([stage.root for stage in plan.stages])
    print(f"cancelled: {', '.join(jobs) or 'nothing was in the queue'}")
