"""The `cluster` section: what a job asks of Slurm, and what the site's nodes have."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megadistill.config.fields import Config, NaturalInt, PositiveInt


class ContainerConfig(Config):
    """The container in which a job's processes run."""

    kind: Literal["pyxis", "apptainer"]
    """Pyxis (srun's --container-image, Enroot) or Apptainer (also Singularity)."""
    image: str
    """Image as the runtime takes it: a squashfs or SIF file, or a registry's name."""
    mounts: list[str] = Field(default_factory=list)
    """`directory` or `directory:inside[:flags]`; the run directory must be among them."""
    python: str = "python3"
    """Python inside the image that has megadistill."""
    options: list[str] = Field(default_factory=list)
    """Further words for the runtime, e.g. `--container-writable` or `--cleanenv`."""


class ClusterConfig(Config):
    """What the job asks of Slurm, and what each node has. A site profile sets most of it."""

    nodes: PositiveInt = 1
    gpus_per_node: NaturalInt = 0
    """0 is a CPU run."""
    gpu_type: str | None = None
    """GRES type, where a site has several: `h100` asks for `--gpus-per-node=h100:8`."""
    rollout_nodes: NaturalInt = 0
    """Nodes set aside for engines (placement: dedicated); 0 on one node shares it."""
    rollout_gpus_per_node: PositiveInt | None = None
    """GPUs of a rollout node of a heterogeneous job; absent: as `gpus_per_node`."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_minutes: PositiveInt = 720
    cpus_per_node: PositiveInt | None = None
    exclusive: bool = True
    signal_seconds: PositiveInt = 300
    """Seconds before the time limit at which Slurm warns the run."""
    max_attempts: PositiveInt = 20
    """Requeues of one job after which the run gives up."""
    modules: list[str] = Field(default_factory=list)
    """Environment modules loaded before the job."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        default_factory=dict
    )
    """Variables of the job, e.g. NCCL_SOCKET_IFNAME, UCX_NET_DEVICES; taken literally."""
    scratch: str | None = None
    """Fast directory of each node; TMPDIR becomes `scratch/megadistill-JOB`."""
    container: ContainerConfig | None = None
    """Absent: processes run on the node itself, in this environment."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines run on the first node before the job, as they are."""

    def contradictions(self) -> Iterator[str]:
        if self.signal_seconds >= 60 * self.time_minutes:
            yield (
                f"signal_seconds: found {self.signal_seconds}, expected less than time_minutes = "
                f"{self.time_minutes}: the job would be asked to stop as soon as it starts"
            )
