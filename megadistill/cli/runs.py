"""Verbs of a run: start it here, on a node or as a job, follow it, report on it."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from megadistill.cli.verbs import Overrides, Run, RunOrSource, app, existing_run, verb


@verb(app, example="train configs/embedded/camopd_medical.yaml steps=4")
def train(config: RunOrSource, overrides: Overrides = None) -> int:
    """Run here, all roles on this machine."""
    from megadistill.cli.check import check_run
    from megadistill.launch.node import run_here
    from megadistill.launch.node_context import local_context

    check_run(config, overrides or (), local_context())
    return run_here(config, overrides or ())


@verb(app, example="node configs/camopd/medical.yaml    (in a job script, behind srun)")
def node(config: RunOrSource, overrides: Overrides = None) -> int:
    """This node's part of a Slurm job."""
    from megadistill.cli.check import check_run
    from megadistill.launch.node import run_under_slurm
    from megadistill.launch.node_context import slurm_context

    check_run(config, overrides or (), slurm_context())
    return run_under_slurm(config, overrides or ())


@verb(app, example="submit train configs/camopd/medical.yaml cluster.partition=hopper")
def submit(
    job: Annotated[Literal["train"], Argument(metavar="VERB", help="verb to run as a job")],
    config: RunOrSource,
    overrides: Overrides = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print job script and layout.")] = False,
) -> None:
    """The same verb as a Slurm job, through submitit."""
    from megadistill.cli.check import check_run
    from megadistill.launch import submit as submit_job

    if not dry_run:
        check_run(config, overrides or ())
    submitted = submit_job(config, overrides or (), verb=job, dry_run=dry_run)
    if not dry_run:
        print(f"job {submitted.job_id}, run directory {submitted.run_dir}")
        print(f"follow it with: megadistill status {submitted.run_dir} --watch")


@verb(app, example="status runs/camopd_medical --watch")
def status(
    run: Run,
    watch: Annotated[bool, Option("--watch", help="Follow it from start to end.")] = False,
    give_up: Annotated[float, Option(metavar="S", help="End after S silent seconds.")] = 1800,
) -> None:
    """Where a run stands: nodes, attempts, last steps, time left. Or the stages of other work."""
    from megadistill.cli import campaigns
    from megadistill.launch.staged_work import PLAN
    from megadistill.report import status as reporting
    from megadistill.rundir import RunDir

    if (Path(run) / PLAN).exists():
        if watch:
            raise ValueError(f"--watch: {run} is no run, ask for its status again instead")
        campaigns.status(run)
    elif watch:
        reporting.watch(RunDir(Path(run).absolute()), interval_s=1.0, give_up_s=give_up)
    else:
        reporting.show(existing_run(run))


@verb(app, example="report runs/camopd_medical runs/mopd_medical --page compared.html")
def report(
    runs: Annotated[list[str], Argument(metavar="RUN", help="run directories")],
    picture: Annotated[
        str | None, Option(metavar="FILE", help="PNG to write; absent: RUN/report.")
    ] = None,
    page: Annotated[
        str | None, Option(metavar="FILE", help="HTML to write; absent: RUN/report.")
    ] = None,
) -> None:
    """A run's effect and cost: table, picture, page. Of several runs, a page that compares them."""
    from megadistill.report.writing import write_report

    write_report([existing_run(path) for path in runs], picture, page)


@verb(app, example="probe runs/camopd_medical")
def probe(
    run: Run, samples: Annotated[int, Option(min=1, help="Most samples of a branch.")] = 32
) -> None:
    """How coherent each branch's gradients are. At the last checkpoint (CaMOPD section 4.4)."""
    from megadistill.evaluate.probe import write_probe

    write_probe(existing_run(run), samples)


@verb(app, example="doctor --cluster configs/clusters/_mysite.yaml")
def doctor(
    config: Annotated[
        str | None, Option(metavar="FILE", help="A run with a `cluster` section.")
    ] = None,
    cluster: Annotated[
        str | None, Option(metavar="FILE", help="Wins over it; see configs/clusters/.")
    ] = None,
    shared: Annotated[str, Option(metavar="DIR", help="Directory that all nodes see.")] = "runs",
) -> int:
    """Check the cluster, here and in a tiny job. Ends with code 1 where no run could go."""
    from rich.console import Console

    from megadistill.config.campaign import load_cluster
    from megadistill.launch.doctor import examine, table

    settings = load_cluster(config, cluster)
    folder = Path(shared).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    findings = list(examine(settings, folder))
    Console().print(table(findings))
    return 1 if any(finding.verdict == "fail" for finding in findings) else 0


@verb(app, example="shard runs/NAME/stages/STAGE/shards/KEY    (in a job)")
def shard(directory: Annotated[str, Argument(help="as in the example")]) -> None:
    """One try of one shard. Its directory holds what it is to do."""
    from megadistill.launch.shards import run_shard

    run_shard(Path(directory))
