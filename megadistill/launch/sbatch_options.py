"""A site profile (the `cluster` section) as options, environment and container of a job.

Values never become shell text unquoted: each is one quoted word of an option, an export, or a
command. Only `cluster.setup` holds shell lines, which the user writes as such.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from megadistill.config.cluster import ClusterConfig, ContainerConfig

SRUN_ARGS = ("--kill-on-bad-exit=1", "--cpu-bind=none")

# A warning that comes while Python still loads must not kill it: USR1 starts out ignored.
START = (
    "bash",
    "-c",
    'trap "" USR1; [[ -z ${TMPDIR-} ]] || mkdir -p -m 700 "$TMPDIR"; exec "$@"',
    "node",
)

JOB_SETUP = (
    'export MEGADISTILL_LAUNCH="$(date +%s%N)"',  # tells this start of the job from others
    "export SUBMITIT_PREEMPT_SIGNAL=USR1",  # until the node process takes the signals over
)

# A container mostly has no scontrol: what it is needed for happens out here.
CONTAINER_SETUP = (
    'MEGADISTILL_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)"',
    'MEGADISTILL_REQUEUE="{folder}/requeue-$SLURM_JOB_ID"',
    "export MEGADISTILL_HOSTS MEGADISTILL_REQUEUE",
    "requeue_if_asked() {",
    '  [[ -e $MEGADISTILL_REQUEUE ]] && rm "$MEGADISTILL_REQUEUE" && scontrol requeue '
    '"${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
    "}",
    "trap requeue_if_asked EXIT",
)


def sbatch_parameters(
    name: str, cluster: ClusterConfig, folder: Path, dependency: str = ""
) -> dict[str, Any]:
    """submitit's parameters (any: they are its own keywords) for one task a node.

    `folder` holds the job's files; `dependency` says in Slurm's words after which jobs it starts.
    """
    texts = {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    gpus: str | int | None = cluster.gpus_per_node or None
    if gpus and cluster.gpu_type is not None:
        gpus = f"{cluster.gpu_type}:{gpus}"
    for key, text in {**texts, "gpu_type": cluster.gpu_type}.items():
        if text is not None and not text.isprintable():
            raise ValueError(f"cluster.{key}: found {text!r}, expected one line of printable text")
    more: dict[str, Any] = {"requeue": True, "signal": f"USR1@{cluster.signal_seconds}"}
    if dependency:
        more["kill-on-invalid-dep"] = "yes"
    return {
        **texts,
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": gpus,
        "cpus_per_task": cluster.cpus_per_node,
        "exclusive": cluster.exclusive or None,
        "mem": "0" if cluster.exclusive else None,  # all of the node's memory
        "time": cluster.time_minutes,
        "dependency": dependency or None,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": more,
        "setup": setup_lines(cluster, folder),
        "srun_args": srun_words(cluster),
    }


def setup_lines(cluster: ClusterConfig, folder: Path) -> list[str]:
    """Shell lines of the job script before its srun; `folder` holds the job's files."""
    lines = []
    if cluster.modules:
        lines.append("type module >/dev/null 2>&1 || source /etc/profile")
        lines.append(shlex.join(["module", "load", *cluster.modules]))
    lines += [f"export {name}={shlex.quote(text)}" for name, text in cluster.environment.items()]
    if cluster.scratch is not None:
        lines.append(f"export TMPDIR={shlex.quote(cluster.scratch)}/megadistill-$SLURM_JOB_ID")
    lines += cluster.setup
    if cluster.container is not None:
        # The folder is ours and a word inside double quotes; refuse what those would interpret.
        if set(str(folder)) & set('"$`\\\n'):
            raise ValueError(f"runs_dir: found {folder}, expected no quotes, $ or backslashes")
        lines += [line.replace("{folder}", str(folder)) for line in CONTAINER_SETUP]
    return [*lines, *JOB_SETUP]


def srun_words(cluster: ClusterConfig) -> list[str]:
    """Words for srun: with Pyxis it is srun that starts the container."""
    container = cluster.container
    if container is None or container.kind != "pyxis":
        return list(SRUN_ARGS)
    words = [f"--container-image={container.image}", f"--container-workdir={Path.cwd()}"]
    if container.mounts:
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
        words.append(f"--container-mounts={','.join(mounts)}")
    return [*SRUN_ARGS, *words, *container.options]


def python_words(cluster: ClusterConfig) -> list[str]:
    """The command that starts Python on a node, inside the container if there is one."""
    container = cluster.container
    if container is None:
        return [*START, sys.executable]
    if container.kind == "pyxis":
        return [*START, container.python]
    return [*START, *apptainer_words(container, with_gpus=cluster.gpus_per_node > 0)]


def apptainer_words(container: ContainerConfig, with_gpus: bool) -> list[str]:
    """`apptainer exec` up to and including Python."""
    words = ["apptainer", "exec", *(["--nv"] if with_gpus else []), f"--pwd={Path.cwd()}"]
    words += [f"--bind={mount}" for mount in container.mounts]
    return [*words, *container.options, container.image, container.python]
