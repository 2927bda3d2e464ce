"""What a refinement and an evaluation begin with: a directory, stages, and shards for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.atomic import write_atomic
from megadistill.config import dump
from megadistill.config.refine import StagedConfig
from megadistill.launch.shards import Arguments, Shard
from megadistill.launch.staged_work import StagedWork
from megadistill.launch.stages import Limits
from megadistill.rollout.vllm_arguments import vllm_environment

FORMAT = 2
"""Changes when a shard computes something else from the same settings."""


def begin(config: StagedConfig, *verb: str) -> StagedWork:
    """Make the directory, with the resolved configuration; `verb` is the command that goes on."""
    is_new = not config.root.exists()
    config.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(config.root / "config.yaml", dump(config))
    return StagedWork(
        name=config.name,
        root=config.root,
        command=(*verb, str(config.root / "config.yaml")),
        limits=Limits(concurrency=config.shards.concurrency, tries=config.shards.tries),
        cluster=config.cluster,
        is_new=is_new,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMaker:
    """Makes shards for GPUs, or for CPUs."""

    gpu: bool
    threads: int | None = None
    """Of each shard on CPUs; absent: as it says itself."""

    def __call__(
        self,
        label: str,
        function: Callable[[Path, Arguments], object],
        arguments: Arguments,
        gpus: int = 0,
    ) -> Shard[Any]:
        environment = {}
        if self.threads is not None:  # torch and vLLM read it when they are imported
            environment = vllm_environment(self.threads, gpu=self.gpu)
        return Shard(
            function=function,
            arguments=arguments,
            label=label,
            gpus=gpus if self.gpu else 0,
            environment=environment,
            version=FORMAT,
        )


def uses_gpu(config: StagedConfig) -> bool:
    """Whether shards compute on GPUs."""
    if config.device != "auto":
        return config.device == "cuda"
    if config.cluster is not None:
        return config.cluster.gpus_per_node > 0
    import torch  # noqa: PLC0415 - slow to import

    return torch.cuda.is_available()
