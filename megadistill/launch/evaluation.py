"""Submits the work on one export: `python -m megadistill.launch.evaluation RUN EXPORT`.

Started beside a run (see `launch/exports.py`); its outcome is a line in RUN/logs/on_export.log.
"""

import shutil
import sys
import traceback
from pathlib import Path

from megadistill.config.cluster import ClusterConfig
from megadistill.launch.campaign import fill, with_resources, work_shards
from megadistill.launch.exports import evaluation, note
from megadistill.launch.fanout import Limits, submit_fanout
from megadistill.rundir import RunDir


def submit_work(run: RunDir, export: Path) -> str | None:
    """Submit the run's `checkpoint.on_export` for one export; the array's number."""
    config = run.load_config()
    work = config.checkpoint.on_export
    assert work is not None
    step = str(step_of(run, export))
    marks = {"{export}": str(export), "{step}": step}
    filled = work.model_copy(update={"args": [fill(word, marks) for word in work.args]})
    shards = work_shards(filled, f"step-{step}", Path(work.config or ""), depends=str(export))
    cluster = with_resources(one_node(config.cluster), work)
    limits = Limits(concurrency=work.concurrency, tries=work.tries)
    root = evaluation(run, export)
    return submit_fanout(root, shards, limits, cluster=cluster, name=f"{config.name}-{step}")


def one_node(cluster: ClusterConfig) -> ClusterConfig:
    """A run's cluster for work on one node."""
    return cluster.model_copy(
        update={"nodes": 1, "rollout_nodes": 0, "rollout_gpus_per_node": None}
    )


def step_of(run: RunDir, export: Path) -> int:
    """The number of optimizer steps an export has seen."""
    if export.name.startswith("step-"):
        return int(export.name.removeprefix("step-"))
    return run.load_config().steps


def main() -> int:
    """`python -m megadistill.launch.evaluation RUN EXPORT`, started by the node process."""
    run, export = RunDir(Path(sys.argv[1])), Path(sys.argv[2])
    if shutil.which("sbatch") is None:
        note(run, f"{export}: not submitted, found no sbatch here")
        return 0
    try:
        job = submit_work(run, export)
    except Exception:  # noqa: BLE001 - the end of this process; its log is where one looks
        note(run, f"{export}: could not be submitted\n{traceback.format_exc()}")
        return 1
    note(run, f"{export}: job {job}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
