"""What the ranks of a Megatron world do with converted checkpoints: load, compare, save."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megadistill.config.schema import ParallelConfig
from megadistill.convert.families import read_spec
from megadistill.convert.hf_files import SafetensorsReader
from megadistill.convert.mapping import load_shard
from megadistill.megatron.cpu import on_cpu_too
from megadistill.megatron.model import build_model, stage_layers
from megadistill.megatron.world import World, connect, disconnect

Models = Sequence[tuple[Path, Path]]
"""Model directories, each with its checkpoint."""


def load_everywhere(layouts: Mapping[str, ParallelConfig], models: Models, out: Path) -> list[str]:
    """Load every checkpoint in each layout; in the first one, also save it to `out`.

    Returns the parameters that are not what the model's own files say, of all ranks.
    """
    wrong = []
    for number, (layout, parallel) in enumerate(layouts.items()):
        world = connect(parallel, device=torch.device("cpu"), seed=1, timeout=timedelta(seconds=60))
        for model_dir, checkpoint in models:
            target = out / model_dir.name if number == 0 else None
            found = _load(parallel, world, model_dir, checkpoint, target)
            wrong += [f"{layout} {model_dir.name} rank {world.rank} {name}" for name in found]
        disconnect(world)
    everywhere: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong)
    return [line for lines in everywhere for line in lines]


@on_cpu_too
def _load(
    parallel: ParallelConfig, world: World, model_dir: Path, checkpoint: Path, target: Path | None
) -> list[str]:
    spec = read_spec(model_dir)
    model = build_model(spec, parallel, "bf16", world)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    loaded = dist_checkpointing.load(_sharded(model, world), str(checkpoint))
    model.load_state_dict(loaded["model"])
    expected = dict(
        load_shard(
            spec,
            SafetensorsReader(model_dir),
            tp=parallel.tp,
            tp_rank=world.groups.tp.rank(),
            layers=stage_layers(spec, world),
            first=world.is_first_stage,
            last=world.is_last_stage,
        )
    )
    held = dict(model.named_parameters())
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(_sharded(model, world), str(target))
    different = {n for n in held.keys() & expected.keys() if not torch.equal(held[n], expected[n])}
    return sorted(different | (held.keys() ^ expected.keys()))


def _sharded(model: Any, world: World) -> dict[str, Any]:
    metadata = {"dp_cp_group": world.groups.dp_cp}
    return {"model": model.sharded_state_dict(metadata=metadata)}
